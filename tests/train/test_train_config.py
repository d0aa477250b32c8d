"""Configurations: the original's format, overrides, and errors that name the key."""

import pytest
from train_tiny import tiny_config

from scalegmn_fast.train.config import apply_overrides, differences, load_config, validate_config


def test_text_numbers_and_none_become_values():
    config = tiny_config()
    config["optimization"]["scheduler_args"]["patience"] = "None"
    config = validate_config(config)
    assert config["optimization"]["optimizer_args"] == {"lr": 0.01, "weight_decay": 0.01}
    assert config["optimization"]["clip_grad_max_norm"] == 10.0
    assert config["optimization"]["scheduler_args"]["patience"] is None
    assert validate_config(config) == config


def test_the_argument_is_not_changed():
    config, again = tiny_config(), tiny_config()
    validate_config(config)
    apply_overrides(config, ["batch_size=2"])
    assert config == again


def test_defaults_and_the_published_place_of_wandb_arguments():
    config = validate_config({"scalegmn_args": {}, "wandb": {"project": "p"}})
    assert (config["batch_size"], config["train_args"]["seed"], config["data"]["normalize"]) == (64, 0, "auto")
    assert config["wandb_args"] == {"project": "p"} and "wandb" not in config


def test_overrides_are_read_as_yaml():
    pytest.importorskip("yaml")
    config = apply_overrides(
        tiny_config(),
        ["train_args.num_epochs=7", "optimization.optimizer_args.lr=1e-4", "data.layer_layout=[2, 4, 1]",
         "data.normalize=true", "scalegmn_args.d_hid=16", "optimization.scheduler_args=null"],
    )  # fmt: skip
    config = validate_config(config)
    assert config["train_args"]["num_epochs"] == 7 and config["optimization"]["optimizer_args"]["lr"] == 1e-4
    assert config["data"]["layer_layout"] == [2, 4, 1] and config["data"]["normalize"] is True
    assert config["scalegmn_args"]["d_hid"] == 16 and config["optimization"]["scheduler_args"] == {}


@pytest.mark.parametrize(("override", "message"), [
    ("train_args.num_epoch=3", "unknown key 'train_args.num_epoch'.*'train_args.num_epochs'"),
    ("batchsize=3", "unknown key 'batchsize'.*'batch_size'"),
    ("optimisation.clip_grad=true", "unknown key 'optimisation'.*'optimization'"),
    ("optimization.scheduler_args.warmup=3", "'optimization.scheduler_args.warmup_steps'"),
    ("batch_size.x=3", "'batch_size' is a value"),
    ("train_args=3", "'train_args' is a section"),
    ("batch_size", "expected key.sub=value"),
    ("=3", "expected key.sub=value"),
    ("batch_size=[1", "not YAML"),
    ("scalegmn_args.d_hidden=8", "unknown key 'scalegmn_args.d_hidden'.*'scalegmn_args.d_hid'"),
    ("scalegmn_args.gnn_args.agregator=max", "nearest valid key is 'scalegmn_args.gnn_args.aggregator'"),
    ("scalegmn_args.mlp_arg.skip=true", "unknown key 'scalegmn_args.mlp_arg'.*'scalegmn_args.mlp_args'"),
    ("scalegmn_args.xyz=true", "unknown key 'scalegmn_args.xyz'.*valid keys: .*num_layers"),
])  # fmt: skip
def test_bad_overrides(override, message):
    pytest.importorskip("yaml")
    with pytest.raises(ValueError, match=message):
        apply_overrides(tiny_config(), [override])


@pytest.mark.parametrize(("name", "override", "message"), [
    ("mnist_cls/pna", "model.d_hidden=8", "nearest valid key is 'model.d_hid'"),
    ("mnist_cls/pna", "model.gnn_backbone.tower=2", "nearest valid key is 'model.gnn_backbone.towers'"),
    ("mnist_cls/pna", "model.gnn_backbone.norm_kwargs.epsilon=1", "nearest valid key is 'model.gnn_backbone.norm_kwa"),
    ("cnn_zoo/rtransformer", "model.graph_constructor.linear_as_con=true", "'model.graph_constructor.linear_as_conv'"),
])  # fmt: skip
def test_bad_overrides_of_neural_graphs(name, override, message):
    pytest.importorskip("yaml")
    with pytest.raises(ValueError, match=message):
        apply_overrides(load_config(name), [override])


def test_overrides_of_keys_that_a_file_leaves_out():
    pytest.importorskip("yaml")
    config = apply_overrides(
        tiny_config(), ["scalegmn_args.edge_memory=store", "scalegmn_args.gnn_args.aggregator=max"]
    )
    assert config["scalegmn_args"]["edge_memory"] == "store"
    assert config["scalegmn_args"]["gnn_args"]["aggregator"] == "max"
    config = apply_overrides(load_config("style_editing/pna"), ["model.exact_bias_readout=true"])
    assert config["model"]["exact_bias_readout"] is True
    assert apply_overrides({}, ["model._target_=own.Net", "model.width=3"])["model"]["width"] == 3


@pytest.mark.parametrize(("changes", "message"), [
    ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
    ({"batch_size": "many"}, "batch_size must be a number, got 'many'"),
    ({"batch_size": 2.5}, "batch_size must be an integer"),
    ({"batch_size": True}, "batch_size must be an integer"),
    ({"train_args__num_epochs": -1}, "train_args.num_epochs"),
    ({"train_args__loss": "CrossEntropy"}, "did you mean 'CrossEntropyLoss'"),
    ({"train_args__patiense": 3}, "'train_args.patiense'; the nearest valid key is 'train_args.patience'"),
    ({"data__normalise": True}, "nearest valid key is 'data.normalize'"),
    ({"data__normalize": "yes"}, "data.normalize must be true, false or auto"),
    ({"data": [1]}, "'data' must be a section"),
    ({"optimization__clip_grad": "on"}, "optimization.clip_grad must be true or false"),
    ({"optimization__clip_grad_max_norm": 0}, "clip_grad_max_norm must be a positive number"),
    ({"optimization__optimizer_args": {"lr": "fast"}}, "optimization.optimizer_args.lr must be a number, got 'fast'"),
    ({"optimization__scheduler_args": {"scheduler": "Warmup"}}, "did you mean 'WarmupLRScheduler'"),
    ({"optimization__scheduler_args": {"scheduler": "StepLR"}}, "scheduler_args.decay_steps is missing"),
    ({"optimization__scheduler_args": {"scheduler": "ReduceLROnPlateau", "decay_rate": 2}}, "must be below 1"),
])  # fmt: skip
def test_bad_values_name_the_key(changes, message):
    with pytest.raises(ValueError, match=message):
        validate_config(tiny_config(**changes))


def test_scalegmn_args_are_required():
    config = tiny_config()
    del config["scalegmn_args"]
    with pytest.raises(ValueError, match="scalegmn_args"):
        validate_config(config)


def test_files_that_are_no_configuration(tmp_path):
    pytest.importorskip("yaml")
    bad = tmp_path / "bad.yml"
    bad.write_text("a: b: c\n")
    with pytest.raises(ValueError, match="bad.yml' is not readable YAML.*line 1"):
        load_config(bad)
    bad.write_text("- 1\n- 2\n")
    with pytest.raises(ValueError, match="must hold a mapping of sections, got list"):
        load_config(bad)
    bad.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ValueError, match="not readable YAML"):
        load_config(bad)


def test_an_unknown_name_gets_the_nearest_published_one():
    with pytest.raises(FileNotFoundError, match="neither a file nor a published name; .*'mnist_cls/scalegmn'"):
        load_config("mnist_cls/scalegm")


def test_every_published_configuration_is_accepted():
    from scalegmn_fast.models import published_names

    names = published_names()
    assert "mnist_cls/scalegmn" in names
    for name in names:
        assert validate_config(load_config(name))["optimization"]["optimizer_name"] == "AdamW"


def test_differences_are_listed_by_dotted_key():
    assert differences({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 5}) == [
        ("a.c", 2, 4), ("d", 3, None), ("e", None, 5),
    ]  # fmt: skip
