"""Data sets: formulas, outside readers (pandas, scikit-learn), and hostile files; images are in test_image_files.py."""

from __future__ import annotations

import gzip
import math
import struct

import numpy as np
import pandas
import pytest
import sklearn.datasets
from hypothesis import given
from hypothesis import strategies as st

from platonic import datasets
from platonic.datasets import load

# ----------------------------------------------------------------------------------------------------- toy problems


@given(m=st.integers(1, 200), periods=st.floats(0, 8))
def test_sine_is_its_formula(m, periods):
    data = datasets.make_sine(m, periods)
    x = data.X_train[:, 0]
    assert data.X_train.shape == (m, 1)
    assert np.all((x > -1) & (x < 1))
    np.testing.assert_allclose(np.diff(x, prepend=-1, append=1), 2 / (m + 1), rtol=1e-12)
    np.testing.assert_allclose(x, -x[::-1], atol=1e-15)
    assert data.y_train.tolist() == pytest.approx([math.sin(periods * math.pi * v) for v in x], abs=1e-13)
    assert data.task == "regression"
    assert data.X_test is None


@given(m=st.integers(2, 201), turns=st.floats(0.1, 4), sampling=st.sampled_from(["arc", "radius"]))
def test_spirals_are_archimedean_and_interleaved(m, turns, sampling):
    data = datasets.make_two_spirals(m, turns, sampling=sampling)
    assert data.X_train.shape == (m, 2)
    assert np.bincount(data.y_train).tolist() == [m // 2, (m + 1) // 2]
    for label in (0, 1):
        points = data.X_train[data.y_train == label]
        radius = np.hypot(*points.T)
        even = radius**2 if sampling == "arc" else radius
        np.testing.assert_allclose(even, np.arange(1, len(points) + 1) / len(points), rtol=1e-12)
        angle = 2 * np.pi * turns * radius + (0 if label else np.pi)
        np.testing.assert_allclose(points, radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1), atol=1e-12)
    if m % 2 == 0:
        np.testing.assert_array_equal(data.X_train[data.y_train == 0], -data.X_train[data.y_train == 1])


def test_arc_spaces_samples_evenly_along_the_spiral():
    points = datasets.make_two_spirals(20_000, turns=2).X_train[:10_000]
    steps = np.hypot(*np.diff(points[2_000:], axis=0).T)
    # step = dt sqrt(1 + (4 pi t)^2) with dt = 1 / (2 m t): from t = sqrt(0.2) on, 1 / (4 pi t)^2 is under 3.2 %
    assert steps.max() / steps.min() < math.sqrt(1.032)


def test_spiral_noise_has_the_deviation_asked_for_and_repeats():
    clean = datasets.make_two_spirals(20_000).X_train
    noisy = [datasets.make_two_spirals(20_000, noise=0.1, random_state=3).X_train for _ in range(2)]
    np.testing.assert_array_equal(*noisy)
    # the standard error of a deviation over 40,000 draws is 0.1 / sqrt(80,000); five of them
    assert abs((noisy[0] - clean).std() - 0.1) < 5 * 0.1 / math.sqrt(80_000)


@given(m=st.integers(1, 300), squares=st.integers(1, 9), seed=st.integers(0, 9))
def test_checkerboard_colours_change_from_square_to_square(m, squares, seed):
    data = datasets.make_checkerboard(m, squares, seed)
    edges = np.linspace(-1, 1, squares + 1)
    column, row = np.searchsorted(edges, data.X_train.T, side="right") - 1
    np.testing.assert_array_equal(data.y_train, (column + row) % 2)
    np.testing.assert_array_equal(data.X_train, datasets.make_checkerboard(m, squares, seed).X_train)


@pytest.mark.parametrize(
    ("name", "options"),
    [("sine", {"n_samples": 0}), ("spirals", {"n_samples": 1}), ("spirals", {"noise": -1}),
     ("spirals", {"noise": math.nan}), ("spirals", {"sampling": "random"}),
     ("checkerboard", {"n_samples": 0}), ("checkerboard", {"squares": 0})],
)  # fmt: skip
def test_toy_sizes_are_checked(name, options):
    with pytest.raises(ValueError, match=f"expected {next(iter(options))} to be"):
        load(name, **options)


# ---------------------------------------------------------------------------------------------------- embedded sets


@pytest.mark.parametrize("name", ["digits", "iris", "wine", "breast_cancer", "diabetes"])
def test_embedded_sets_are_scikit_learns_split_in_two(name):
    data, source = load(name), getattr(sklearn.datasets, f"load_{name}")()
    rows = sorted(map(tuple, np.column_stack([source.data, source.target])))
    train, test = (np.column_stack(pair) for pair in ((data.X_train, data.y_train), (data.X_test, data.y_test)))
    assert sorted(map(tuple, np.concatenate([train, test]))) == rows
    assert len(test) == math.ceil(0.2 * len(rows))
    assert data.feature_names == [str(n) for n in source.feature_names]
    assert data.image_shape == ((8, 8) if name == "digits" else None)
    if name == "diabetes":
        assert data.task == "regression"
    else:
        assert data.task == "classification"
        share = np.bincount(data.y_test) / np.bincount(source.target)
        assert np.all(np.abs(np.bincount(data.y_test) - 0.2 * np.bincount(source.target)) <= 1), share
    np.testing.assert_array_equal(data.X_train, load(name).X_train)


# ------------------------------------------------------------------------------------------------------------- IDX


def idx_bytes(array, code=0x08):
    return bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder, *, train="train", test="t10k", dot="-", zipped=False, shape=(4, 3), m=(5, 2)):
    """A small set like MNIST; returns its images and labels, train then test."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    arrays = []
    for split, count in zip((train, test), m, strict=True):
        images = generator.integers(0, 256, (count, *shape), dtype=np.uint8)
        labels = generator.integers(0, 10, count, dtype=np.uint8)
        arrays += [images, labels]
        for what, array in (("images", images), ("labels", labels)):
            content = idx_bytes(array)
            name = f"{split}-{what}{dot}idx{array.ndim}-ubyte"
            (folder / (name + ".gz" * zipped)).write_bytes(gzip.compress(content) if zipped else content)
    return arrays


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("dot", ["-", "."])
@pytest.mark.parametrize(
    ("name", "inner", "train", "test"),
    [
        ("mnist", "", "train", "t10k"),
        ("mnist", "mnist", "train", "t10k"),
        ("mnist", "MNIST/raw", "train", "t10k"),
        ("kmnist", "kmnist", "train", "t10k"),
        ("fashion-mnist", "FashionMNIST/raw", "train", "t10k"),
        ("emnist-digits", "", "emnist-digits-train", "emnist-digits-test"),
        ("emnist-letters", "emnist", "emnist-letters-train", "emnist-letters-test"),
    ],
)
def test_idx_sets_are_found_and_read(name, inner, train, test, dot, zipped, tmp_path):
    arrays = write_idx(tmp_path / inner, train=train, test=test, dot=dot, zipped=zipped)
    data = load(name, data_dir=tmp_path)
    assert (data.name, data.task, data.image_shape) == (name, "classification", (4, 3))
    assert data.X_train.dtype == np.float32
    assert data.y_train.dtype == np.int64
    np.testing.assert_array_equal(data.X_train, arrays[0].reshape(5, -1))
    np.testing.assert_array_equal(data.y_train, arrays[1])
    np.testing.assert_array_equal(data.X_test, arrays[2].reshape(2, -1))
    np.testing.assert_array_equal(data.y_test, arrays[3])


def test_a_folder_of_idx_files_is_recognised_by_its_path(tmp_path):
    write_idx(tmp_path / "mine")
    assert load(tmp_path / "mine").name == "mine"


def test_the_folder_of_a_set_wins_over_files_beside_it(tmp_path):
    write_idx(tmp_path, shape=(2, 2))
    write_idx(tmp_path / "kmnist", shape=(3, 3))
    assert load("kmnist", tmp_path).image_shape == (3, 3)


def test_missing_idx_files_are_named_with_folders_and_source(tmp_path):
    write_idx(tmp_path / "mnist")
    (tmp_path / "mnist" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError) as error:
        load("mnist", data_dir=tmp_path)
    message = str(error.value)
    assert "train-images-idx3-ubyte" in message
    assert f"{tmp_path / 'mnist'} (which lacks t10k-labels-idx1-ubyte)" in message
    assert str(tmp_path / "MNIST" / "raw") in message
    assert "LeCun" in message
    with pytest.raises(FileNotFoundError, match="NIST"):
        load("emnist-digits", data_dir=tmp_path)


good = idx_bytes(np.zeros((2, 3, 3), np.uint8))
HOSTILE_IDX = {
    "empty": (b"", "not an IDX file"),
    "png": (b"\x89PNG\r\n\x1a\n", "not an IDX file"),
    "unknown type": (b"\0\0\x07\x03" + good[4:], "not an IDX file"),
    "other type": (b"\0\0\x0d\x03" + good[4:], "got float32"),
    "labels for images": (idx_bytes(np.zeros(2, np.uint8)), "in 3 dimensions, got uint8 .* in 1"),
    "255 dimensions": (b"\0\0\x08\xff" + good[4:], "in 255"),
    "header cut": (good[:10], "within its header"),
    "truncated": (good[:-1], r"truncated|more than the file can hold"),
    "too long": (good + b"\0", "longer than"),
    "huge": (b"\0\0\x08\x03" + b"\xff" * 12, "more than the file can hold"),
    "large": (b"\0\0\x08\x03" + struct.pack(">3I", 60_000, 1024, 1024), "more than the file can hold"),
    "no images": (idx_bytes(np.zeros((0, 3, 3), np.uint8)), r"0 images, but .* 2 labels"),
    "no pixels": (idx_bytes(np.zeros((2, 0, 3), np.uint8)), "no pixels"),
    "other count": (idx_bytes(np.zeros((3, 3, 3), np.uint8)), r"3 images, but .* 2 labels"),
    "other size": (idx_bytes(np.zeros((2, 3, 4), np.uint8)), r"images of \(2, 2\)"),
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("case", HOSTILE_IDX)
def test_hostile_idx_files_are_refused_and_named(case, zipped, tmp_path):
    content, message = HOSTILE_IDX[case]
    write_idx(tmp_path, m=(2, 2), shape=(2, 2))
    (tmp_path / "train-images-idx3-ubyte").write_bytes(gzip.compress(content) if zipped else content)
    if zipped and case == "truncated":
        message = "announces 18 bytes .* holds 17"
    with pytest.raises(ValueError, match=message) as error:
        load("mnist", tmp_path)
    assert "train-images-idx3-ubyte" in str(error.value)


def test_every_truncation_of_an_idx_file_is_a_named_error(tmp_path):
    write_idx(tmp_path, m=(2, 2), shape=(2, 2))
    file = tmp_path / "train-images-idx3-ubyte"
    plain = file.read_bytes()
    for content in (plain, gzip.compress(plain)):
        for length in range(len(content)):
            file.write_bytes(content[:length])
            with pytest.raises(ValueError, match="train-images"):
                load("mnist", tmp_path)


def test_a_gzip_bomb_is_not_unpacked(tmp_path):
    write_idx(tmp_path, m=(2, 2), shape=(2, 2))
    bomb = gzip.compress(idx_bytes(np.zeros((2, 2, 2), np.uint8)) + bytes(50_000_000))
    (tmp_path / "train-images-idx3-ubyte").write_bytes(bomb)
    with pytest.raises(ValueError, match="longer than the 8 bytes"):
        load("mnist", tmp_path)


def test_a_damaged_gzip_checksum_is_noticed(tmp_path):
    write_idx(tmp_path, m=(2, 2), shape=(2, 2))
    file = tmp_path / "train-images-idx3-ubyte"
    content = bytearray(gzip.compress(file.read_bytes()))
    content[-6] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="damaged or truncated gzip"):
        load("mnist", tmp_path)


# ------------------------------------------------------------------------------------------------------------- CSV


def write_csv(folder, text):
    (folder / "t.csv").write_text(text, encoding="utf-8")
    return folder / "t.csv"


words = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=8).map(
    lambda text: "w" + text.strip()
)
finite = st.floats(allow_nan=False, allow_infinity=False)


@given(rows=st.lists(st.tuples(finite, words, st.integers(-9, 9)), min_size=1, max_size=8))
def test_csv_reads_what_pandas_writes(rows, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "t.csv"
    names = ["a", 'kind, in "quotes"', "b"]
    pandas.DataFrame(rows, columns=names).to_csv(path, index=False)
    data = load(path, target=names[1])
    assert (data.name, data.task, data.feature_names, data.X_test) == ("t", "classification", ["a", "b"], None)
    np.testing.assert_array_equal(data.X_train, np.array([(a, b) for a, _, b in rows], float))
    assert data.y_train.tolist() == [word.strip() for _, word, _ in rows]


@pytest.mark.parametrize(
    ("cells", "task", "expected"),
    [
        (["1", "2", "1"], None, np.array([1, 2, 1])),
        (["1.0", "-2.0", "1e2"], None, np.array([1, -2, 100])),
        (["1", "2.5", "1"], None, np.array([1, 2.5, 1])),
        (["1", "2", "1"], "regression", np.array([1.0, 2, 1])),
        (["1", "2.5", "1"], "classification", np.array(["1", "2.5", "1"])),
        (["yes", "no", "NA"], None, np.array(["yes", "no", "NA"])),
        (["1", "2", "b"], None, np.array(["1", "2", "b"])),
        (["1_0", "2_0", "1_0"], None, np.array(["1_0", "2_0", "1_0"])),
        (["90071992547409930"] * 3, None, np.array(["90071992547409930"] * 3)),
    ],
)
def test_the_target_decides_the_task(cells, task, expected, tmp_path):
    path = write_csv(tmp_path, "x,y\n" + "".join(f"{i},{cell}\n" for i, cell in enumerate(cells)))
    data = load(path, task=task)
    assert data.y_train.dtype == expected.dtype
    assert data.y_train.tolist() == expected.tolist()
    assert data.task == ("regression" if expected.dtype.kind == "f" else "classification")


def test_csv_dialect(tmp_path):
    path = write_csv(tmp_path, '\ufeff x ; y\r\n1; "a;b"\r\n\r\n 2 ;c')
    with pytest.raises(ValueError, match="pass delimiter=';'"):
        load(path)
    data = load(path, delimiter=";")
    assert data.X_train.tolist() == [[1.0], [2.0]]
    assert data.y_train.tolist() == ["a;b", "c"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "two or more columns"),
        ("x\n1\n", "two or more columns"),
        ("x,y\n", "no rows"),
        (",x,y\n0,1,2\n", "column 1 has no name"),
        ("x,x,y\n0,1,2\n", "two columns 'x'"),
        ("1,2.5\n3,4\n", "expected a header line"),
        ("x,y\n1,2\n3\n", "line 3: 1 cells, the header has 2"),
        ("x,y\n1,2\n3,4,5\n", "line 3: 3 cells"),
        ("x,y\n1,2\n,3\n", r"line 3: column 'x' has a missing value \(''\)"),
        ("x,y\n1,2\nNaN,3\n", "line 3: column 'x' has a missing value"),
        ("x,y\n1,2\n?,3\n", "line 3: column 'x' has a missing value"),
        ("x,y\n1,2\n3,\n", "line 3: column 'y' has a missing value"),
        ("x,y\n1,2\n3,NA\n", "line 3: column 'y' has a missing value"),
        ("x,y\n1,a\n3,\n", "line 3: column 'y' has a missing value"),
        ("x,y\n1,2\ninf,3\n", "line 3: column 'x' holds 'inf', which is not finite"),
        ("x,y\n1,2\n1e999,3\n", "line 3: .* not finite"),
        ("x,y\n1,2\nred,3\n", "line 3: column 'x' is not numeric, it holds 'red': one-hot encode"),
        ("x,y\n1,2\n1_000,3\n", "line 3: column 'x' is not numeric"),
        ('x,y\n1,"2\n', "not readable as CSV"),
        ("x,y\n1," + "a" * 200_000 + "\n", "not readable as CSV"),
    ],
)
def test_bad_tables_are_named(text, message, tmp_path):
    path = write_csv(tmp_path, text)
    with pytest.raises(ValueError, match=message) as error:
        load(path)
    assert str(path) in str(error.value)


def test_csv_options_and_bytes_are_checked(tmp_path):
    path = write_csv(tmp_path, "x,y\n1,a\n")
    with pytest.raises(ValueError, match="no column 'z'; its columns are x, y"):
        load(path, target="z")
    with pytest.raises(ValueError, match="expected task"):
        load(path, task="ranking")
    with pytest.raises(ValueError, match="column 'y' is not numeric"):
        load(path, task="regression")
    path.write_bytes(b"x,y\n1,\xff\n")
    with pytest.raises(ValueError, match="not text in UTF-8"):
        load(path)


# ------------------------------------------------------------------------------------------------------------ by name


def test_toy_problems_take_options():
    assert load("spirals", n_samples=10, turns=2).X_train.shape == (10, 2)
    assert set(datasets.NAMES) >= {
        "sine",
        "spirals",
        "checkerboard",
        "digits",
        "iris",
        "mnist",
        "fashion-mnist",
        "kmnist",
    }


def test_unknown_names_paths_and_options_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"unknown data set 'cifar'; expected a path, or one of sine, .*kmnist"):
        load("cifar")
    for path in ("none.csv", "none.tar.gz", "folder/none"):
        with pytest.raises(FileNotFoundError, match="no such file or folder"):
            load(path, tmp_path)
    (tmp_path / "x.parquet").touch()
    with pytest.raises(ValueError, match=r"ends in \.csv, \.tar"):
        load("x.parquet", tmp_path)
    with pytest.raises(TypeError, match="spirals has no option 'turn'; its options are n_samples, turns, noise"):
        load("spirals", turn=1)
    with pytest.raises(TypeError, match="iris has no option 'turns'; its options are none"):
        load("iris", turns=1)
    with pytest.raises(ValueError, match="unknown IDX set"):
        datasets.load_idx(tmp_path, "svhn")
    with pytest.raises(ValueError, match="unknown embedded data set"):
        datasets.load_embedded("boston")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        datasets.load_image_folder(tmp_path / "none")
