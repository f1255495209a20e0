"""``python -m platonic``: its tables against the estimators in Python, saved models, wrong calls, interruption."""

from __future__ import annotations

import csv
import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
from sklearn.model_selection import train_test_split

import platonic
from platonic import PlatonicMLP, PlatonicMLPClassifier, PlatonicMLPRegressor, cli, datasets

ROOT = Path(platonic.__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
COMMAND = [sys.executable, "-m", "platonic"]


def run(capsys, *argv):
    """Exit code, and what was printed to stdout and stderr."""
    code = cli.main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    return code, out, err


def succeed(capsys, *argv):
    code, out, err = run(capsys, *argv)
    assert (code, err) == (0, "")
    return out


def rows_of(out):
    """The table's rows: dictionaries by column."""
    lines = out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.split()[:1] == ["layer"])
    rows = []
    for line in lines[head + 1 :]:
        cells = [cell for cell in line.split("  ") if cell.strip()]
        if not line.split()[0].isdigit():
            break
        rows.append(dict(zip(lines[head].split(), map(str.strip, cells), strict=True)))
    return rows


@pytest.fixture
def flowers(tmp_path):
    """Iris as a CSV file whose classes are words."""
    data = datasets.load("iris")
    words = np.array(["setosa", "versi, color", "virginica"])
    X, y = np.concatenate([data.X_train, data.X_test]), np.concatenate([data.y_train, data.y_test])
    write_csv(
        tmp_path / "flowers.csv", ["a", "b", "c", "d", "kind"], [[*x, words[c]] for x, c in zip(X, y, strict=True)]
    )
    return tmp_path / "flowers.csv"


def write_csv(path, header, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


# --------------------------------------------------------------------------------------------------------------- fit


def test_the_table_is_what_the_estimator_says(capsys):
    out = succeed(capsys, "fit", "--data", "digits", "--hidden", "30,20", "--seed", 3)
    data = datasets.load("digits")
    model = PlatonicMLPClassifier((30, 20), random_state=3).fit(data.X_train, data.y_train)
    rows = rows_of(out)
    assert [int(row["layer"]) for row in rows] == [1, 2]
    for row, record in zip(rows, model.layer_scores_, strict=True):
        assert int(row["width"]) == record.width
        assert row["projection"] == record.projection
        assert float(row["LSD"]) == pytest.approx(record.lsd, rel=1e-3)
        assert float(row["train"]) == pytest.approx(record.score, abs=5.1e-5)
        assert float(row["seconds"]) >= 0
    first = PlatonicMLPClassifier((30,), random_state=3).fit(data.X_train, data.y_train)
    assert float(rows[0]["test"]) == pytest.approx(first.score(data.X_test, data.y_test), abs=5.1e-5)
    test = model.score(data.X_test, data.y_test)
    assert float(rows[1]["test"]) == pytest.approx(test, abs=5.1e-5)
    train = model.score(data.X_train, data.y_train)
    last = out.splitlines()[-1]
    assert last.startswith(f"accuracy: train {train:.4f}, test {test:.4f}; ")
    assert last.endswith(f"{65 * 30 + 31 * 20 + 21 * 10:,} parameters")


def test_regression_scores_are_in_units_of_y(capsys):
    out = succeed(capsys, "fit", "--data", "diabetes", "--hidden", "15,10")
    data = datasets.load("diabetes")
    model = PlatonicMLPRegressor((15, 10), random_state=0).fit(data.X_train, data.y_train)
    test = model.score(data.X_test, data.y_test)
    assert float(rows_of(out)[1]["test"]) == pytest.approx(test, abs=1e-6)
    assert f"coefficient of determination: train {model.score(data.X_train, data.y_train):.6f}, test {test:.6f};" in out


def test_two_classes_and_a_split_of_its_own(capsys):
    out = succeed(capsys, "fit", "--data", "spirals", "--data-option", "n_samples=400", "--hidden", "20", "--seed", 1)
    data = datasets.make_two_spirals(400)
    X, X_test, y, y_test = train_test_split(
        data.X_train, data.y_train, test_size=0.2, random_state=0, stratify=data.y_train
    )
    model = PlatonicMLPClassifier((20,), random_state=1).fit(X, y)
    assert float(rows_of(out)[0]["test"]) == pytest.approx(model.score(X_test, y_test), abs=5.1e-5)
    assert "320 to train, 80 to test" in out


def test_without_a_test_part_its_column_is_empty(capsys):
    out = succeed(
        capsys, "fit", "--data", "sine", "--data-option", "n_samples=50", "--hidden", "5", "--test-fraction", 0
    )
    assert "test 0" not in out.splitlines()[-1]
    header, row = out.splitlines()[1:3]
    end = header.index("test") + 4
    assert row[end - 8 : end].strip() == ""


def test_every_parameter_of_the_estimators_has_an_option(capsys, monkeypatch):
    seen = {}

    def remember(self, X, y, sample_weight, observe):
        seen.update(self.get_params())
        raise ValueError("enough")

    monkeypatch.setattr(PlatonicMLPClassifier, "_fit", remember)
    defaults = PlatonicMLPClassifier().get_params()
    assert run(capsys, "fit", "--data", "digits")[0] == 2
    assert seen == {**defaults, "random_state": 0}
    chosen = {
        "--hidden": ("7,5", "hidden_layer_sizes", (7, 5)), "--activation": ("tanh", "activation", "tanh"),
        "--projection": ("pairs,elm", "projection", ["pairs", "elm"]), "--alpha": ("2", "alpha", 2.0),
        "--beta": ("0.5", "beta", 0.5), "--tries": ("3", "n_tries", 3), "--l2": ("1e-3", "l2", 1e-3),
        "--solver": ("svd", "solver", "svd"), "--tol": ("1e-9", "tol", 1e-9), "--ema": ("0.4", "ema", 0.4),
        "--scaling": ("absolute", "scaling", "absolute"), "--image-shape": ("auto", "image_shape", (8, 8)),
        "--class-weight": ("balanced", "class_weight", "balanced"), "--dtype": ("float32", "dtype", "float32"),
        "--device": ("cpu", "device", "cpu"), "--seed": ("9", "random_state", 9),
    }  # fmt: skip
    flags = [part for flag, (text, _, _) in chosen.items() for part in (flag, text)]
    assert run(capsys, "fit", "--data", "digits", *flags)[0] == 2
    assert seen == {name: value for _, name, value in chosen.values()} | {"verbose": False}


@pytest.mark.parametrize(("text", "shape"), [("none", None), ("8x8", (8, 8)), ("8x8x1", (8, 8, 1))])
def test_image_shapes(text, shape, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(
        PlatonicMLPClassifier, "_fit", lambda self, *args, **kwargs: seen.append(self.image_shape) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        run(capsys, "fit", "--data", "digits", "--image-shape", text)
    assert seen == [shape]


def test_a_csv_of_words_is_classes_and_of_fractions_a_regression(capsys, flowers, tmp_path):
    assert "accuracy" in succeed(capsys, "fit", "--data", "flowers.csv", "--data-dir", tmp_path, "--hidden", 8)
    (tmp_path / "numbers.csv").write_text("target;x\n" + "".join(f"{i / 7};{i}\n" for i in range(30)))
    out = succeed(
        capsys, "fit", "--data", tmp_path / "numbers.csv", "--target", "target", "--data-option", "delimiter=;",
        "--hidden", 8,
    )  # fmt: skip
    assert "coefficient of determination" in out


def test_task_overrides(capsys, tmp_path):
    write_csv(tmp_path / "t.csv", ["x", "y"], [[i / 40, i % 4] for i in range(40)])
    assert "accuracy" in succeed(capsys, "fit", "--data", tmp_path / "t.csv", "--hidden", 5)
    out = succeed(capsys, "fit", "--data", tmp_path / "t.csv", "--hidden", 5, "--task", "regression")
    assert "coefficient of determination" in out
    assert "coefficient" in succeed(capsys, "fit", "--data", "iris", "--hidden", 5, "--task", "regression")


def test_jitter_is_told(capsys, tmp_path, monkeypatch):
    from platonic import commands

    out = []
    table = commands.LayerTable(PlatonicMLPClassifier(), datasets.load("iris"))
    monkeypatch.setattr(table, "_score", lambda *args: 0.5)
    monkeypatch.setattr(commands.tqdm, "write", lambda text, file: out.append(text))
    table._bar = commands.tqdm(disable=True)
    table._observe(0, commands.LayerRecord(3, "elm", 1.0, 0.9, 0.0, 3, 1e-10), None, None)
    assert "1e-10 was added" in out[1]


# ----------------------------------------------------------------------------------------------------------- predict


def test_words_survive_saving_and_predicting(capsys, flowers, tmp_path):
    model, target = tmp_path / "m.safetensors", tmp_path / "p.csv"
    out = succeed(capsys, "fit", "--data", flowers, "--hidden", 12, "--test-fraction", 0, "--save", model)
    assert f"model saved to {model}" in out
    table = read_csv(flowers)
    write_csv(tmp_path / "new.csv", ["id", "d", "c", "b", "a"], [[i, *row[3::-1]] for i, row in enumerate(table[1:])])
    succeed(capsys, "predict", "--model", model, "--data", tmp_path / "new.csv", "--out", target, "--proba")
    data = datasets.load_csv(flowers)
    expected = PlatonicMLPClassifier((12,), random_state=0).fit(data.X_train, data.y_train)
    header, *rows = read_csv(target)
    assert header == ["prediction", "probability_setosa", "probability_versi, color", "probability_virginica"]
    assert [row[0] for row in rows] == expected.predict(data.X_train).tolist()
    probabilities = np.array([[float(cell) for cell in row[1:]] for row in rows])
    np.testing.assert_allclose(probabilities, expected.predict_proba(data.X_train), rtol=1e-9, atol=1e-12)
    # with the truth at hand, the score too
    out = succeed(capsys, "predict", "--model", model, "--data", flowers, "--target", "kind", "--out", target)
    assert f"accuracy: {expected.score(data.X_train, data.y_train):.4f}" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["flowers.csv", "m.safetensors", "new.csv", "p.csv"]


def test_regression_round_trip_to_stdout(capsys, tmp_path):
    write_csv(tmp_path / "curve.csv", ["x", "y"], [[x, x * x + 0.5] for x in np.linspace(-1, 1, 60)])
    model = tmp_path / "m.safetensors"
    succeed(capsys, "fit", "--data", tmp_path / "curve.csv", "--hidden", 10, "--save", model)
    write_csv(tmp_path / "x.csv", ["x"], [[0.0], [0.5]])
    out = succeed(capsys, "predict", "--model", model, "--data", tmp_path / "x.csv")
    header, *values = out.splitlines()
    assert header == "prediction"
    fitted = PlatonicMLPRegressor.load(model)
    del fitted.feature_names_in_
    assert [float(v) for v in values] == fitted.predict(np.array([[0.0], [0.5]])).tolist()
    assert [float(v) for v in values] == pytest.approx([0.5, 0.75], abs=0.1)
    code, out, err = run(capsys, "predict", "--model", model, "--data", tmp_path / "curve.csv", "--target", "y")
    assert code == 0
    assert len(out.splitlines()) == 61  # the table alone: it can be redirected
    assert err.startswith("coefficient of determination: 0.9")


def test_predict_on_a_named_set_uses_its_test_part(capsys, tmp_path):
    data = datasets.load("iris")
    model = PlatonicMLP((6,), random_state=0).fit(data.X_train, data.y_train)
    model.save(tmp_path / "m.safetensors")
    out = succeed(
        capsys, "predict", "--model", tmp_path / "m.safetensors", "--data", "iris", "--out", tmp_path / "p.csv",
        "--device", "cpu",
    )  # fmt: skip
    assert out.splitlines()[0].startswith(f"{len(data.X_test)} predictions saved to")
    assert out.splitlines()[1] == f"accuracy: {model.score(data.X_test, data.y_test):.4f}"
    assert [int(row[0]) for row in read_csv(tmp_path / "p.csv")[1:]] == model.predict(data.X_test).tolist()


def test_integer_classes_are_compared_as_numbers(capsys, tmp_path):
    write_csv(tmp_path / "t.csv", ["x", "y"], [[i, i % 2] for i in range(20)])
    succeed(capsys, "fit", "--data", tmp_path / "t.csv", "--hidden", 20, "--test-fraction", 0, "--save", tmp_path / "m")
    write_csv(tmp_path / "u.csv", ["x", "y"], [[i, f"{i % 2}.0"] for i in range(20)])
    scores = [
        succeed(capsys, "predict", "--model", tmp_path / "m", "--data", path, "--target", "y", "--out", tmp_path / "p")
        for path in (tmp_path / "t.csv", tmp_path / "u.csv")
    ]
    assert scores[0] == scores[1]


def test_several_outputs_are_several_columns(capsys, tmp_path):
    X = np.linspace(0, 1, 30)[:, None]
    PlatonicMLPRegressor((4,), random_state=0).fit(X, np.hstack([X, -X])).save(tmp_path / "m.safetensors")
    write_csv(tmp_path / "x.csv", ["x"], X.tolist())
    out = succeed(capsys, "predict", "--model", tmp_path / "m.safetensors", "--data", tmp_path / "x.csv")
    assert out.splitlines()[0] == "prediction_1,prediction_2"


# ------------------------------------------------------------------------------------------------------- wrong calls

WRONG_FIT = {
    "no data": ([], "the following arguments are required: --data"),
    "unknown set": (["--data", "mnits"], "unknown data set 'mnits'"),
    "missing file": (["--data", "none.csv"], "no such file or folder: none.csv"),
    "missing idx": (["--data", "mnist"], "train-images-idx3-ubyte"),
    "missing idx, remedy": (["--data", "mnist"], "--data-dir FOLDER looks elsewhere"),
    "hidden": (["--data", "iris", "--hidden", "3,x"], "--hidden: expected positive integers separated by commas"),
    "no hidden": (["--data", "iris", "--hidden", ""], "--hidden: expected positive integers"),
    "zero hidden": (["--data", "iris", "--hidden", "0"], "--hidden: expected positive integers"),
    "activation": (["--data", "iris", "--activation", "swish"], "--activation: invalid choice: 'swish'"),
    "projection": (["--data", "iris", "--projection", "pca"], "--projection: expected auto, random"),
    "projections": (["--data", "iris", "--projection", "elm,elm"], "projection names 2 layers"),
    "pca": (["--data", "iris", "--projection", "platonic_pca"], "has only 4 + 3 principal components"),
    "alpha": (["--data", "iris", "--alpha", "big"], "--alpha: expected a number, got 'big'"),
    "alpha nan": (["--data", "iris", "--alpha", "nan"], "--alpha: expected a number, got 'nan'"),
    "negative alpha": (["--data", "iris", "--alpha", "-1"], "alpha must be a number in"),
    "tries": (["--data", "iris", "--tries", "1.5"], "--tries: expected an integer"),
    "no tries": (["--data", "iris", "--tries", "0"], "n_tries must be an integer of at least 1"),
    "l2": (["--data", "iris", "--l2", "much"], "--l2: expected a number or loo"),
    "negative l2": (["--data", "iris", "--l2", "-1"], "l2 must be a number in"),
    "solver": (["--data", "iris", "--solver", "sgd"], "--solver: invalid choice"),
    "scaling": (["--data", "iris", "--scaling", "none"], "--scaling: invalid choice"),
    "ema": (["--data", "iris", "--ema", "2"], "ema must be a number in [0, 1]"),
    "image shape": (["--data", "digits", "--image-shape", "8"], "--image-shape: expected none, auto, HxW"),
    "other image shape": (["--data", "digits", "--image-shape", "7x7"], "X has 64 features"),
    "no image shape": (["--data", "iris", "--image-shape", "auto"], "give it as HxW"),
    "unused image shape": (["--data", "digits", "--image-shape", "8x8", "--projection", "elm"], "leave it out"),
    "dtype": (["--data", "iris", "--dtype", "float16"], "--dtype: invalid choice"),
    "device": (["--data", "iris", "--device", "tpu9"], "device 'tpu9' cannot be used"),
    "seed": (["--data", "iris", "--seed", "one"], "--seed: expected an integer"),
    "negative seed": (["--data", "iris", "--seed", "-1"], "between 0 and"),
    "task": (["--data", "iris", "--task", "ranking"], "--task: invalid choice"),
    "values as classes": (["--data", "sine", "--task", "classification"], "cannot keep a part"),
    "target": (["--data", "iris", "--target", "kind"], "--target is for CSV files"),
    "class weight": (["--data", "diabetes", "--class-weight", "balanced"], "--class-weight is for classes"),
    "fraction": (["--data", "sine", "--test-fraction", "1"], "--test-fraction: expected a number from 0"),
    "own split": (["--data", "iris", "--test-fraction", "0.5"], "iris comes with its own test part"),
    "option": (["--data", "sine", "--data-option", "turns=2"], "sine has no option 'turns'"),
    "option form": (["--data", "sine", "--data-option", "turns"], "--data-option: expected NAME=VALUE"),
    "option value": (["--data", "sine", "--data-option", "n_samples=0"], "expected n_samples to be 1 or more"),
    "save folder": (["--data", "iris", "--save", "nowhere/m.safetensors"], "no such folder: nowhere (make it first)"),
    "save to folder": (["--data", "iris", "--save", "."], "expected a file, but . is a folder"),
    "plot folder": (["--data", "iris", "--plot", "nowhere/p.png"], "no such folder: nowhere"),
    "plot format": (["--data", "iris", "--plot", "p.docx"], "expected a name that ends in"),
    "unknown": (["--data", "iris", "--epochs", "3"], "unrecognized arguments: --epochs 3"),
    "abbreviated": (["--data", "iris", "--hid", "3"], "unrecognized arguments: --hid 3"),
}


def assert_refused(capsys, argv, message):
    code, _, err = run(capsys, *argv)
    assert code == 2
    assert message in err
    assert err.startswith("platonic: error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")


@pytest.mark.parametrize(("argv", "message"), WRONG_FIT.values(), ids=WRONG_FIT)
def test_wrong_fit_is_one_line_and_code_2(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(capsys, ["fit", *argv], message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argv", [[], ["train"], ["--epochs"]])
def test_wrong_commands(argv, capsys):
    assert_refused(capsys, argv, "python -m platonic --help lists the options")


def test_wrong_csv(capsys, flowers, tmp_path):
    assert_refused(capsys, ["fit", "--data", flowers, "--target", "species"], "its columns are a, b, c, d, kind")
    assert_refused(capsys, ["fit", "--data", flowers, "--target", "a"], "column 'kind' is not numeric")
    assert_refused(capsys, ["fit", "--data", flowers, "--task", "regression"], "line 2: column 'kind' is not numeric")
    write_csv(tmp_path / "rare.csv", ["x", "y"], [[1, 0], [2, 0], [3, 1]])
    assert_refused(capsys, ["fit", "--data", tmp_path / "rare.csv"], "--test-fraction 0 fits all rows")


@pytest.fixture
def saved(flowers, tmp_path, capsys):
    succeed(capsys, "fit", "--data", flowers, "--hidden", 4, "--save", tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def test_wrong_predict(capsys, saved, flowers, tmp_path):
    model = ["predict", "--model", saved]
    missing = tmp_path / "no.safetensors"
    assert_refused(capsys, ["predict", "--data", flowers], "required: --model")
    assert_refused(capsys, ["predict", "--model", missing, "--data", flowers], f"no such model file: {missing}")
    assert_refused(capsys, ["predict", "--model", flowers, "--data", flowers], "not a readable safetensors file")
    assert_refused(capsys, [*model, "--data", tmp_path / "no.csv"], "no.csv")
    assert_refused(capsys, [*model, "--data", "digits"], "digits has 64 features, but the model was fitted to 4")
    assert_refused(capsys, [*model, "--data", "digits", "--target", "y"], "--target is for CSV files")
    assert_refused(capsys, [*model, "--data", flowers, "--target", "price"], "no column 'price'")
    assert_refused(capsys, [*model, "--data", flowers, "--out", tmp_path / "no" / "p.csv"], "no such folder")
    assert_refused(capsys, [*model, "--data", flowers, "--device", "tpu9"], "--device cpu always can")
    assert_refused(capsys, [*model, "--data", flowers, "--data-option", "turns=1"], "has no option 'turns'")
    write_csv(tmp_path / "short.csv", ["a", "b"], [[1, 2]])
    assert_refused(capsys, [*model, "--data", tmp_path / "short.csv"], "no column 'c'; its columns are a, b")
    data = datasets.load("diabetes")
    PlatonicMLPRegressor((3,)).fit(data.X_train, data.y_train).save(tmp_path / "r.safetensors")
    regression = ["predict", "--model", tmp_path / "r.safetensors"]
    assert_refused(capsys, [*regression, "--data", "diabetes", "--proba"], "--proba is for classes")
    write_csv(tmp_path / "wide.csv", [f"c{i}" for i in range(11)], [list(range(11))])
    assert_refused(capsys, [*regression, "--data", tmp_path / "wide.csv"], "--target NAME sets aside")


def test_a_failed_write_leaves_the_old_file(capsys, saved, flowers, tmp_path, monkeypatch):
    (tmp_path / "p.csv").write_text("old")
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    assert_refused(capsys, ["predict", "--model", saved, "--data", flowers, "--out", tmp_path / "p.csv"], "disk full")
    assert (tmp_path / "p.csv").read_text() == "old"
    assert not list(tmp_path.glob(".platonic*"))


def test_without_matplotlib_plot_says_what_to_install(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert_refused(capsys, ["fit", "--data", "iris", "--plot", tmp_path / "p.png"], 'pip install "platonic-dl[plot]"')


def test_warnings_are_one_line(capsys, monkeypatch):
    import warnings

    monkeypatch.setattr(
        PlatonicMLPClassifier, "_fit", lambda *a, **k: [warnings.warn("mind\nthis", stacklevel=1), 1 / 0]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with pytest.raises(ZeroDivisionError):  # a defect of ours is not dressed up as the user's
            cli.main(["fit", "--data", "iris"])
    assert capsys.readouterr().err == "platonic: warning: mind this\n"


def test_interrupted_in_process(capsys, monkeypatch, tmp_path):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(PlatonicMLPClassifier, "_fit", interrupt)
    code, _, err = run(capsys, "fit", "--data", "iris", "--save", tmp_path / "m.safetensors")
    assert (code, err) == (130, "interrupted\n")
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------- as a real process


def test_version_and_help():
    done = subprocess.run([*COMMAND, "--version"], env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"platonic-dl {platonic.__version__}\n", "")
    done = subprocess.run([*COMMAND, "fit", "--help"], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0
    assert "examples:" in done.stdout


LONG = ["fit", "--data", "iris", "--hidden", ",".join(["8"] * 3000), "--projection", "elm"]


def test_interrupted_process_exits_130_and_writes_nothing(tmp_path):
    process = subprocess.Popen(
        [*COMMAND, *LONG, "--save", str(tmp_path / "m.safetensors")],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stdout:
        if line.split()[:1] == ["2"]:
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_leaves_is_no_error():
    process = subprocess.Popen(
        [*COMMAND, *LONG], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 1


def test_progress_is_for_terminals_only():
    argv = [*COMMAND, "fit", "--data", "iris", "--hidden", "5,5"]
    done = subprocess.run(argv, env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    done = subprocess.run(argv, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=terminal, text=True)
    shown = os.read(master, 65536).decode()
    os.close(terminal)
    os.close(master)
    assert done.returncode == 0
    assert "0/2" in shown
    assert len(rows_of(done.stdout)) == 2
