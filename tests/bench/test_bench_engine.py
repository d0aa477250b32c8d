"""The ablation of the engine: both processes step, and its table names what was changed."""

from bench import engine, isolated


def test_parts_differ_from_the_package_as_it_comes():
    assert all(part.environment or part.options or part.dtype != "float32" for part in engine.PARTS.values())


def test_a_part_is_compared_in_two_processes():
    row = {"config": "svhn/scalegmn_relu", "batch": 1, "part": "edges recomputed"}
    row |= engine.compare(row["config"], row["batch"], row["part"], rounds=2, limit=60.0)
    assert row["all"]["rounds"] == row["changed"]["rounds"] == 2
    assert row["ratio"]["median"] > 0
    failed = {"config": "svhn/scalegmn_relu", "batch": 1, "part": "no pool", "failed": isolated.OUT_OF_MEMORY}
    lines = engine.page({"rows": [row, failed]}).splitlines()
    assert lines[0] == "| changed | means | svhn/scalegmn_relu, batch 1 |"
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| no pool", "| edges recomputed"]
    assert isolated.OUT_OF_MEMORY in lines[2] and f"{row['ratio']['median']:.2f}x" in lines[3]
