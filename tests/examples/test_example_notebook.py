"""analysis.ipynb, cell by cell in one namespace, on a small CSV."""

import json
from pathlib import Path

import pytest
from small_runs import EXAMPLES

pandas = pytest.importorskip("pandas")
pyplot = pytest.importorskip("matplotlib.pyplot")
pytest.importorskip("scipy")

GAINS = {0: 0.1, 1: 0.3, 2: 0.2}  # of PO2+ over PO2, by seed


def rows(arch, methods, seeds, activation_bits=32):
    found = []
    for seed in seeds:
        for method in methods:
            plan = [("none", 32)] if method == "fp32" else [(quantizer, bits) for quantizer in ("po2", "po2plus") for bits in (3, 4)]
            for quantizer, bits in plan:
                top1 = 98 - 8 / bits + seed + (GAINS[seed] if quantizer == "po2plus" else 0)
                found.append(
                    {
                        "arch": arch, "dataset": "digits", "method": method, "quantizer": quantizer, "bits": bits,
                        "activation_bits": activation_bits, "seed": seed, "top1": top1, "test_loss": 0.1,
                        "relative_mse": 0.0 if bits == 32 else 0.03 if quantizer == "po2" else 0.027, "file_bytes": 1000 * bits,
                        "latency1_ms": 1.0, "float_latency1_ms": 2.0, "latency128_ms": 30.0, "float_latency128_ms": 45.0,
                        "checkpoint": "runs/last.pt", "fingerprint": "0123",
                    }
                )  # fmt: skip
    return found


@pytest.fixture
def execute(monkeypatch, tmp_path):
    """Function running the notebook's code cells on CSVs of the given tables; its namespace and the figures left open."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    pyplot.switch_backend("Agg")

    def run(*tables):
        files = [tmp_path / f"{number}.csv" for number in range(len(tables))]
        for file, table in zip(files, tables, strict=True):
            pandas.DataFrame(table).to_csv(file, index=False)
        monkeypatch.setenv("RESULTS", ":".join(map(str, files)))
        namespace = {}
        for cell in json.loads(Path(EXAMPLES / "analysis.ipynb").read_text())["cells"]:
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), namespace)
        for number in pyplot.get_fignums():
            pyplot.figure(number).canvas.draw()
        return namespace, len(pyplot.get_fignums())

    yield run
    pyplot.close("all")


def test_charts_and_tables(execute):
    found, figures = execute(rows("resnet20", ["fp32", "ptq", "qat"], (0, 1, 2)), rows("mobilenet", ["fp32", "ptq", "ptq+bn"], (0, 1)))
    assert figures == 3
    table, ratios, differences = (found[name] for name in ("table", "ratios", "differences"))
    assert len(table) == 2 * (1 + 2 * 4)
    assert table.loc[("resnet20, digits", "QAT", "PO2+ 4"), "top-1, %"] == "97.20 ± 1.05"
    assert ratios.loc[("resnet20, digits", "PO2 4"), "times smaller"] == 8
    assert ratios.loc[("mobilenet, digits", "PO2+ 3"), "speed-up, batch 128"] == 1.5
    assert len(differences) == 2 * 2 * 2
    first = differences.iloc[0]
    # Three paired gains 0.1, 0.3, 0.2: mean 0.2, deviation 0.1, and t(0.975, 2) = 4.3027.
    assert (first.points, first.seeds) == (pytest.approx(0.2), 3)
    assert (first.low, first.high) == (pytest.approx(0.2 - 0.24842, abs=1e-4), pytest.approx(0.2 + 0.24842, abs=1e-4))
    assert first["relative MSE, %"] == pytest.approx(-10)


def test_every_quantizer_has_a_row(execute):
    table = pandas.DataFrame(rows("resnet20_q", ["qat"], (0, 1)))
    table["quantizer"] = table["quantizer"].map({"po2": "xnor", "po2plus": "ternary"})
    shown = execute(rows("resnet20_q", ["fp32"], (0, 1)), table.to_dict("records"))[0]["table"]
    assert set(shown.index.get_level_values("configuration")) == {"fp32", "XNOR 3", "XNOR 4", "ternary 3", "ternary 4"}


def test_other_widths_and_float_layers_are_models_of_their_own(execute):
    tables = [[row | {"width": width, "float_layers": "default"} for row in rows("resnet20", ["fp32", "ptq"], (0, 1))] for width in (8, 16)]
    left_out = [row | {"width": 8, "float_layers": "conv1 fc"} for row in rows("resnet20", ["ptq"], (0, 1))]
    found, _ = execute(*tables, left_out)
    assert set(found["models"]) == {"resnet20, digits, width 8", "resnet20, digits, width 16"}
    assert set(found["table"].seeds) == {2} and ("resnet20, digits, width 8", "PTQ", "PO2 4 float conv1 fc") in found["table"].index
    assert len(found["differences"]) == 3 * 2


@pytest.mark.parametrize(
    "table", [rows("resnet20", ["fp32"], (0,)), rows("resnet20", ["fp32", "ptq"], (0,)), rows("resnet20", ["qat"], (0, 1), 8)],
    ids=["full precision only", "one seed", "no full precision"],
)  # fmt: skip
def test_incomplete_results(execute, table):
    assert execute(table)[1] == 3


def test_cells_are_short_and_introduced():
    cells = json.loads(Path(EXAMPLES / "analysis.ipynb").read_text())["cells"]
    for before, cell in zip(cells, cells[1:], strict=False):
        if cell["cell_type"] == "code":
            assert before["cell_type"] == "markdown"
            assert len(cell["source"]) <= 30 and not cell["outputs"]
