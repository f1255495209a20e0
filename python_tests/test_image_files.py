"""Images from folders and archives, whole and hostile."""

from __future__ import annotations

import builtins
import gzip
import io
import lzma
import struct
import tarfile
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from platonic.datasets import images, load


def png(array, form="PNG"):
    stream = io.BytesIO()
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(stream, form)
    return stream.getvalue()


def pixels(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def image_files(shape=(4, 3, 3), splits=("train/", "test/")):
    """Path -> pixels of two images of two classes in each split."""
    names = [f"{split}{label}/{i}.png" for split in splits for label in ("cat", "dog") for i in range(2)]
    return {name: pixels(seed, *shape) for seed, name in enumerate(names)}


def write_files(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else png(content))


def tar_bytes(files, mode="w"):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:
        for name, content in files.items():
            content = content if isinstance(content, bytes) else png(content)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


@pytest.mark.parametrize("shape", [(4, 3, 3), (4, 3), (4, 3, 4)])
@pytest.mark.parametrize("kind", ["folder", "tar", "tar.gz", "tar.xz"])
def test_images_are_read_from_folders_and_archives(kind, shape, tmp_path):
    files = image_files(shape)
    path = tmp_path / f"animals{'' if kind == 'folder' else '.' + kind}"
    if kind == "folder":
        write_files(path, files)
    else:
        backwards = {f"./{name}": files[name] for name in reversed(files)}
        path.write_bytes(tar_bytes(backwards, "w" if kind == "tar" else f"w:{kind[4:]}"))
    data = load(path)
    assert (data.name, data.task, data.image_shape) == ("animals", "classification", shape)
    assert data.X_train.dtype == np.float32
    expected = np.stack([array.reshape(-1) for array in files.values()])
    np.testing.assert_array_equal(data.X_train, expected[:4])
    np.testing.assert_array_equal(data.X_test, expected[4:])
    assert data.y_train.tolist() == data.y_test.tolist() == ["cat", "cat", "dog", "dog"]


@pytest.mark.parametrize("around", ["", "animals/"])
def test_without_splits_all_images_are_for_training(around, tmp_path):
    files = image_files((2, 2), splits=(around,))
    (tmp_path / "a.tgz").write_bytes(tar_bytes(files, "w:gz"))
    data = load("a.tgz", data_dir=tmp_path)
    assert data.X_test is None
    assert data.X_train.tolist() == [array.ravel().tolist() for array in files.values()]


def test_an_archive_may_have_a_folder_around_the_splits(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_bytes(image_files((2, 2), splits=("a/train/", "a/test/"))))
    assert len(load(tmp_path / "a.tar").X_test) == 4


def test_jpeg_is_decoded_as_pillow_does(tmp_path):
    content = png(pixels(0, 8, 8, 3), "JPEG")
    write_files(tmp_path, {"a/1.jpg": content, "b/2.JPEG": content})
    data = load(tmp_path)
    np.testing.assert_array_equal(data.X_train[1], np.asarray(Image.open(io.BytesIO(content))).reshape(-1))
    assert data.y_train.tolist() == ["a", "b"]


@pytest.mark.parametrize("mode", ["1", "P", "LA"])
def test_pillow_modes(mode, tmp_path):
    image = Image.fromarray(pixels(0, 5, 4, 3)).convert(mode)
    write_files(tmp_path, {"a/1.png": png(image)})
    data = load(tmp_path)
    expected = {"1": image.convert("L"), "P": image.convert("RGB"), "LA": image}[mode]
    np.testing.assert_array_equal(data.X_train[0].reshape(data.image_shape), np.asarray(expected))


def test_mode_makes_grey_and_colour_alike(tmp_path):
    grey, colour = pixels(0, 4, 4), pixels(1, 4, 4, 3)
    write_files(tmp_path, {"a/1.png": grey, "b/2.png": colour})
    with pytest.raises(ValueError, match=r"b/2\.png: 4 x 4 RGB, but .*a/1\.png is 4 x 4 L"):
        load(tmp_path)
    assert load(tmp_path, mode="RGB").image_shape == (4, 4, 3)
    data = load(tmp_path, mode="L")
    np.testing.assert_array_equal(data.X_train[1], np.asarray(Image.fromarray(colour).convert("L")).reshape(-1))


def test_other_files_are_not_read(tmp_path):
    files = image_files((2, 2))
    write_files(tmp_path, {**files, "README.md": b"x", "train/cat/notes.txt": b"x", "train/cat/.hidden.png": b"x"})
    assert len(load(tmp_path).X_train) == 4


BAD_IMAGES = {
    "not an image": ({"cat/bad.png": b"hello"}, r"cat/bad\.png: not a readable"),
    "truncated": ({"cat/bad.png": png(pixels(0, 64, 64))[:-200]}, r"cat/bad\.png: not a readable"),
    "gif in disguise": ({"cat/bad.png": png(pixels(0, 4, 4), "GIF")}, r"cat/bad\.png: not a readable"),
    "16 bits": ({"cat/bad.png": png(np.zeros((4, 4), np.uint16))}, r"cat/bad\.png: pixels of Pillow's mode 'I"),
    "size": ({"cat/a.png": pixels(0, 4, 4), "cat/bad.png": pixels(0, 4, 5)}, r"cat/bad\.png: 5 x 4 L, but .*a\.png"),
    "third split": ({"train/a/1.png": pixels(0, 2, 2), "val/a/1.png": pixels(0, 2, 2)}, r"train/a/1\.png beside val/a"),
    "mixed": ({"train/a/1.png": pixels(0, 2, 2), "b/1.png": pixels(0, 2, 2)}, "found both"),
    "class and test": ({"a/1.png": pixels(0, 2, 2), "test/a/1.png": pixels(0, 2, 2)}, "found both"),
    "only test": ({"test/a/1.png": pixels(0, 2, 2)}, "only test"),
    "new class": ({"train/a/1.png": pixels(0, 2, 2), "test/b/1.png": pixels(0, 2, 2)}, "class b has test images"),
}  # fmt: skip


@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images_and_layouts_are_named(case, archive, tmp_path):
    files, message = BAD_IMAGES[case]
    path = tmp_path / ("set.tar" if archive else "set")
    if archive:
        path.write_bytes(tar_bytes(files))
    else:
        write_files(path, files)
    with pytest.raises(ValueError, match=message):
        load(path)


@pytest.mark.parametrize("files", [{}, {"notes.txt": b"x"}, {"cat/a.bmp": b"x"}])
def test_no_images_is_said_with_the_expected_layout(files, tmp_path):
    write_files(tmp_path, files)
    with pytest.raises(FileNotFoundError, match=r"CLASS/\*\.png"):
        load(tmp_path)


def test_a_png_that_announces_more_than_it_may_hold_is_not_decoded(tmp_path):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">2I5B", 8000, 8000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    write_files(tmp_path, {"a/bomb.png": bomb})
    with pytest.raises(ValueError, match=r"bomb\.png: 1 images take 768000000 bytes"):
        load(tmp_path, max_bytes=1 << 20)


def test_every_truncation_of_an_archive_is_a_named_error(tmp_path):
    path = tmp_path / "a.tar"
    plain = tar_bytes(image_files((2, 2), splits=("",)), "w")
    end = len(plain.rstrip(b"\0"))
    end += -end % 512 + 512  # the first zero block is the end mark; what follows is padding
    for length in [*range(0, end, 64), end - 1]:
        path.write_bytes(plain[:length])
        with pytest.raises(ValueError, match=r"a\.tar"):
            load(path)
    path.write_bytes(plain[:end])
    assert len(load(path).X_train) == 4
    for packed in (gzip.compress(plain), lzma.compress(plain)):
        for length in range(1, len(packed), 37):
            path.write_bytes(packed[:length])
            with pytest.raises(ValueError, match=r"a\.tar"):
                load(path)


def test_a_damaged_header_within_an_archive_is_not_taken_for_its_end(tmp_path):
    content = bytearray(tar_bytes(image_files((2, 2), splits=("",))))
    content[1024] ^= 1  # the first byte of the second header: its checksum no longer fits
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ValueError, match="damaged or truncated"):
        load(tmp_path / "a.tar")


def test_an_archive_bomb_stops_at_the_limit(tmp_path):
    path = tmp_path / "a.tar.xz"
    path.write_bytes(lzma.compress(tar_bytes({"a/1.png": pixels(0, 2, 2), "filler.bin": bytes(30_000_000)})))
    with pytest.raises(ValueError, match="unpacks to more than max_bytes=1000000"):
        load(path, max_bytes=1_000_000)


def test_an_entry_of_absurd_size_is_refused_before_it_is_read(tmp_path):
    member = tarfile.TarInfo("a/1.png")
    for size in (1 << 33, 1 << 60):
        member.size = size
        (tmp_path / "a.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
        with pytest.raises(ValueError, match="more than"):
            load(tmp_path / "a.tar")


def test_links_and_paths_out_of_an_archive_reach_nothing(tmp_path):
    (tmp_path / "secret.png").write_bytes(png(pixels(0, 2, 2)))
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        link = tarfile.TarInfo("a/1.png")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret.png")
        archive.addfile(link)
    (tmp_path / "a.tar").write_bytes(stream.getvalue())
    with pytest.raises(ValueError, match=r"a/1\.png is a link"):
        load(tmp_path / "a.tar")
    (tmp_path / "b.tar").write_bytes(tar_bytes({"../../escape/1.png": pixels(0, 2, 2)}))
    before = sorted(tmp_path.parent.rglob("*"))
    with pytest.raises(ValueError, match="expected train/CLASS/image"):
        load(tmp_path / "b.tar")
    assert sorted(tmp_path.parent.rglob("*")) == before


def test_a_long_chain_of_headers_is_refused(tmp_path):
    header = tarfile.TarInfo("a/1.png")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 1
    (tmp_path / "a.tar").write_bytes((header.tobuf(tarfile.GNU_FORMAT) + bytes(512)) * 3000)
    with pytest.raises(ValueError, match=r"a\.tar: not a tar archive .* damaged"):
        load(tmp_path / "a.tar")


@given(data=st.data())
def test_flipped_bytes_in_an_archive_load_or_raise_but_never_crash(data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "a.tar"
    content = bytearray(tar_bytes(image_files((2, 2), splits=("",))))[:6144]
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        assert load(path).X_train.dtype == np.float32
    except (ValueError, FileNotFoundError) as error:
        assert "a.tar" in str(error)


def test_without_pillow_the_error_names_the_extra(tmp_path, monkeypatch):
    real = builtins.__import__

    def without_pillow(name, *rest):
        if name == "PIL":
            raise ImportError("No module named 'PIL'")
        return real(name, *rest)

    write_files(tmp_path, {"a/1.png": pixels(0, 2, 2)})
    monkeypatch.setattr(builtins, "__import__", without_pillow)
    with pytest.raises(ImportError, match=r'pip install "platonic-dl\[plot\]"'):
        load(tmp_path)


def test_a_file_too_large_for_an_image_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "_MAX_IMAGE_FILE", 50)
    write_files(tmp_path, {"a/1.png": pixels(0, 8, 8)})
    with pytest.raises(ValueError, match=r"1\.png: \d+ bytes, more than"):
        load(tmp_path)


def test_mode_is_checked(tmp_path):
    with pytest.raises(ValueError, match="expected mode"):
        load(tmp_path, mode="HSV")
