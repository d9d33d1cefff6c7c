"""What benchmarks leave in results/*.json, and the words that README and RESULTS.md make of it."""

import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def results(monkeypatch, tmp_path):
    """benchmarks/results.py, which writes to a folder of the test's."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import results

    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(results, "describe", lambda: {"cpu": "new"})
    return results


@pytest.fixture
def readme(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import readme
    import result_files

    monkeypatch.setattr(result_files, "FOLDER", tmp_path)
    return readme


def leave(folder, name, **figures):
    (folder / f"{name}.json").write_text(json.dumps({"machine": {"cpu": "old"}, **figures}))


def test_a_partial_run_keeps_other_rows(results, tmp_path):
    old = [{"name": name, "seed": seed, "top1": 1.0} for name in ("a", "b") for seed in (0, 1)]
    leave(tmp_path, "accuracy", recipe="--epochs 3", runs=old)
    new = [{"name": "b", "seed": 0, "top1": 2.0}, {"name": "c", "seed": 0, "top1": 2.0}]
    runs = results.merged("accuracy", "runs", new, by=("name", "seed"), recipe="--epochs 3")
    aged = [{"machine": {"cpu": "old"}, **row} for row in old]
    assert runs == [aged[0], aged[1], new[0], aged[3], new[1]]
    results.write("accuracy", {"recipe": "--epochs 3", "runs": runs})
    content = json.loads((tmp_path / "accuracy.json").read_text())
    assert content["machine"] == {"cpu": "new"} and content["runs"] == runs
    # Once more: a row keeps the machine that it was measured on.
    assert results.merged("accuracy", "runs", [], by=("name", "seed"))[0]["machine"] == {"cpu": "old"}
    assert results.merged("accuracy", "runs", new, by=("name", "seed"), recipe="--epochs 4") == new
    assert results.merged("another", "runs", new, by=("name", "seed")) == new


def test_a_partial_run_keeps_other_sides(results, tmp_path):
    leave(tmp_path, "step_time", batch=128, results={"contiguous": {"s": 1.0}, "channels_last": {"s": 2.0}})
    found = results.merged("step_time", "results", {"channels_last": {"s": 3.0}}, batch=128)
    assert list(found.items()) == [("contiguous", {"machine": {"cpu": "old"}, "s": 1.0}), ("channels_last", {"s": 3.0})]
    assert results.merged("step_time", "results", {}, batch=128).keys() == {"contiguous", "channels_last"}
    assert results.merged("step_time", "results", {}, batch=64) == {}


def test_counts_are_the_results(readme):
    runs = [{"group_size": size, "guarded": guarded} for size in (16, 4) for guarded in (True, False)]
    [row] = readme.diffq_reliability({"widths": {"lenet": 6}, "lived": {"true": 2, "false": 1}, "runs": runs})
    assert "1 models, groups of 4, 16, mnist5k | 2 of 2 | 1 of 2 |" in row
    runs = [{"name": name, "top1": 90 + seed, "size_mib": 0.5} for name in ("fp32", "DiffQ, penalty 5") for seed in (0, 2)]
    [row] = readme.diffq_accuracy({"runs": runs})
    assert "2 seeds, DiffQ with penalty 5 | 91.0 % in 512 KiB | 91.0 % in 512 KiB |" in row


def test_slower_is_not_called_faster(readme):
    layer = {
        "layer": "conv 3x3",
        "isas": {"avx512": {name: {"median_s": 1e-3, "speedup": 0.9} for name in ("ternary", "1x2 bits", "8 bits")}},
    }
    ternary, signs = readme.few_bits({"results": [layer]})
    assert "| 0.90 times as fast; 1 layers: 0.90 to 0.90 (short: at least 1.4 asked) |" in ternary
    assert "| 0.90 times as fast; 1 layers: 0.90 to 0.90 |" in signs


def test_what_missed_its_bar_says_so(readme):
    sides = {"binary": {"median_s": 2e-3}, "fp32": {"median_s": 9e-3}, "OpenVINO int8": {"median_s": 3e-3}}
    result = {"isa": "avx512", "threads": 1, "results": [{"model": "resnet18", "sides": sides}]}
    assert "1.50 times as fast as the best int8 (short: at least 2 asked)" in readme.binary_models(result)[0]
    sides["OpenVINO int8"]["median_s"] = 5e-3
    assert "2.50 times as fast as the best int8;" in readme.binary_models(result)[0]
    sides["binary, captured"] = {"median_s": 1e-3}
    assert "| 1.00 | 9.00 | 9.0 times as fast, 5.00 times as fast as the best int8; as a module 2.00;" in readme.binary_models(result)[0]


def test_every_machine_is_named(readme, tmp_path):
    machines = {name: {"cpu": name, "cores": 2, "torch": "2.13", "date": "2026-01-01"} for name in ("one", "two")}
    content = {"machine": machines["one"], "runs": [{"machine": machines["two"]}, {"machine": None}]}
    (tmp_path / "accuracy.json").write_text(json.dumps(content))
    text = readme.measured_on(["accuracy"])
    assert "one, 2 cores" in text and "two, 2 cores" in text and "On a GPU: not yet measured." in text
    (tmp_path / "gpu_step.json").write_text(json.dumps(content))
    assert "On a GPU: `gpu_step.json`." in readme.measured_on(["accuracy"])
