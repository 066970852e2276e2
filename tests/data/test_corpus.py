"""The corpus: what is held out, what is dropped, and that nothing held out is trained on."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sysconfig
from pathlib import Path

import pytest

from dsv4.data import corpus as module
from dsv4.data.corpus import File, build_corpus, heldout_texts, is_heldout, load_manifest, texts
from dsv4.data.documents import corpus_tokenizer, encode_corpus, load_documents
from dsv4.data.filters import Contamination, NearCopies, poor, shingles
from dsv4.data.manpage import plain_text

LIB = Path(sysconfig.get_path("stdlib"))
MODULES = ("argparse", "configparser", "copy", "csv", "difflib", "fractions", "graphlib", "heapq", "random", "shlex")


def _heldout_name() -> str:
    """A name that the rule holds out, found by the rule."""
    return next(f"module{n}.py" for n in range(1000) if is_heldout(f"module{n}.py", 10_000))


def _write(root: Path, name: str, text: str) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def candidates(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[File], str]:
    """A small machine: real modules, one of them held out under its new name, and copies of it in disguise."""
    root = tmp_path_factory.mktemp("machine")
    secret = (LIB / "textwrap.py").read_text()
    held = _heldout_name()
    files = [File("stdlib", "python", held, _write(root, f"lib/{held}", secret))]
    for name in MODULES:
        free = next(f"{name}{n}.py" for n in range(99) if not is_heldout(f"{name}{n}.py", 10_000))
        files.append(File("stdlib", "python", free, _write(root, f"lib/{free}", (LIB / f"{name}.py").read_text())))
    reformatted = re.sub(r"\n\s*#.*", "", secret).replace("'", '"').replace(", ", ",\n        ")
    for name, text in {
        "vendored/copy.py": reformatted,
        "vendored/part.py": "import os\n\n" + secret[2000:9000] + "\n\nclass Other:\n    pass\n" * 20,
        "other/heap.py": (LIB / "heapq.py").read_text().replace("heap", "pile", 3),
        "other/table.py": "TABLE = [\n" + "".join(f"    0x{n:06x}, {n * 7}, {n * 13},\n" for n in range(400)) + "]\n",
    }.items():
        files.append(File("packages", name.split("/")[0], name, _write(root, name, text)))
    return files, held


@pytest.fixture(scope="module")
def built(candidates: tuple[list[File], str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "text"
    build_corpus(out, 10_000_000, candidates[0])
    return out


def test_copies_of_held_out_files_are_dropped_and_named(built: Path, candidates: tuple[list[File], str]) -> None:
    manifest, held = load_manifest(built), candidates[1]
    assert {row["path"]: row["copies"] for row in manifest["contaminated"]} == {
        "vendored/copy.py": held,
        "vendored/part.py": held,
    }
    assert manifest["dropped"] == {"copies a held-out file": 2, "near copy": 1, "tables": 1}


def test_no_passage_of_a_held_out_file_is_in_the_training_text(built: Path) -> None:
    def letters(text: str) -> str:
        return re.sub(r"\W|^\s*#.*", "", text, flags=re.M)

    training = "\0".join(letters(text) for source in module.SHARES for _, text in texts(built, source))
    assert len(training) > 100_000
    for name, text in heldout_texts(built).items():
        held = letters(text)
        leaks = [held[at : at + 200] for at in range(0, len(held) - 200, 100) if held[at : at + 200] in training]
        assert not leaks, f"{name}: {leaks[0]}"


def test_manifest_describes_every_byte(built: Path) -> None:
    manifest = load_manifest(built)
    for source in (*module.SHARES, "heldout"):
        total = 0
        for row, text in texts(built, source):
            assert hashlib.sha256(text.encode()).hexdigest() == row["sha256"]
            assert (row["split"] == "heldout") == (source == "heldout")
            total += row["bytes"]
        assert total == (built / f"{source}.txt").stat().st_size
    assert manifest["train_files"] == len(MODULES)


def test_build_depends_on_the_files_alone(built: Path, candidates: tuple[list[File], str], tmp_path: Path) -> None:
    build_corpus(tmp_path / "again", 10_000_000, candidates[0])
    for path in built.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_byte_limit_and_package_share_hold(candidates: tuple[list[File], str], tmp_path: Path) -> None:
    manifest = build_corpus(tmp_path / "small", 200_000, candidates[0])
    largest = max(row["bytes"] for row in manifest["files"])
    assert 0.3 * 200_000 <= manifest["train_bytes"]["stdlib"] < 0.3 * 200_000 + largest
    assert manifest["dropped"]["over the source's share"] > 0


def test_held_out_rule_needs_only_the_name() -> None:
    names = [f.relative_to(LIB).as_posix() for f in LIB.rglob("*.py") if "-packages" not in f.as_posix()]
    held = [n for n in names if is_heldout(n, (LIB / n).stat().st_size)]
    assert 30 <= len(held) <= 90, f"{len(held)} held-out files"
    assert not [n for n in held if "test" in n.split("/")]
    name = _heldout_name()
    assert not is_heldout(name, 3_999) and not is_heldout(name, 100_001) and not is_heldout(f"test/{name}", 10_000)
    assert not is_heldout(name.replace(".py", ".txt"), 10_000)


def test_without_a_standard_library_the_builder_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="standard library"):
        build_corpus(tmp_path / "none", 1000, [])
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x = 1\n" * 10, "size"),
        ("# This file was automatically generated.\n" + "value = something.other\n" * 40, "generated"),
        ("value = '" + "ab cd " * 200 + "'\n" + "line = 1\n" * 30, "long lines"),
        ("".join(f"{n}, {n * n}, {n * 31}\n" for n in range(200)), "tables"),
        ("слово за словом\n" * 40, "mostly not ASCII"),
        ("the same line again and again\n" * 300, "compresses strangely"),
        ((LIB / "heapq.py").read_text(), None),
    ],
)
def test_poor_text_is_recognised(text: str, reason: str | None) -> None:
    assert poor(text.encode()) == reason


def test_not_utf8_is_refused() -> None:
    assert poor(b"caf\xe9 is a word\n" * 40) == "not UTF-8"


def test_shingles_ignore_layout_but_not_words() -> None:
    words = [f"word{n}" for n in range(40)]
    plain, laid_out = " ".join(words).encode(), ",\n  ".join(words).encode()
    assert (shingles(plain, 3) == shingles(laid_out, 3)).all() and len(shingles(plain, 3)) == 33
    other = plain.replace(b"word20", b"other")
    assert (shingles(plain, 3) != shingles(other, 3)).sum() == 8, "a word is part of eight runs of eight words"
    assert len(shingles(b"too short", 3)) == 0


def test_near_copies_and_contamination_have_thresholds() -> None:
    data = (LIB / "heapq.py").read_bytes()
    copies = NearCopies()
    assert copies.share(data) == 0
    copies.keep(data)
    assert copies.share(data) == 1 and copies.share((LIB / "csv.py").read_bytes()) < 0.1
    finder = Contamination({"heapq.py": data})
    assert finder.copied_from((LIB / "csv.py").read_bytes()) is None
    found = finder.copied_from(data)
    assert found is not None and found[0] == "heapq.py" and found[1] > 1000


def test_a_shared_licence_is_no_contamination() -> None:
    licence = "".join(
        f"# clause {n} of a licence that many authors put above many unrelated files\n" for n in range(20)
    )
    held, other = ((LIB / name).read_text() for name in ("heapq.py", "csv.py"))
    finder = Contamination({"heapq.py": (licence + held).encode()})
    assert finder.copied_from((licence + other).encode()) is None
    assert finder.copied_from((other + held).encode()) is not None


def test_manual_pages_become_text(tmp_path: Path) -> None:
    roff = (
        '.\\" a comment\n.TH COPY 1 "May 2026" "tools"\n.SH NAME\ncopy \\- copy \\fIfiles\\fP\n.SH OPTIONS\n.TP\n'
        '.BR \\-f ", " \\-\\-force\nnever \\(lqask\\(rq first\n.IP \\(bu 2\nfirst point\n'
        ".de XX\nhidden\n..\n.nf\ncode\n"
    )
    text = plain_text(roff)
    assert text == (
        'COPY(1)\n\nNAME\ncopy - copy files\n\nOPTIONS\n\n-f, --force\nnever "ask" first\n\n* first point\n\ncode\n'
    )
    assert plain_text(".so man1/other.1\n") == ""
    path = tmp_path / "copy.1.gz"
    path.write_bytes(gzip.compress(roff.encode()))
    assert File("man", "copy", "copy.1.gz", path).read().decode() == text


def test_encoded_documents_decode_to_the_text(built: Path, tmp_path: Path) -> None:
    tokenizer = corpus_tokenizer(built, 512)
    meta = encode_corpus(built, tokenizer, tmp_path / "tokens", split_rate=0.5)
    again = encode_corpus(built, tokenizer, tmp_path / "again", split_rate=0.5)
    whole = encode_corpus(built, tokenizer, tmp_path / "whole", split_rate=0.0)
    assert meta["tokens"] > whole["tokens"], "half of the merged punctuation and line ends should be split"
    assert meta["tokens"] == again["tokens"] and meta["sources"]["stdlib"]["bytes"] == meta["bytes"]
    documents = load_documents(tmp_path / "tokens", "stdlib")
    assert (documents.tokens == load_documents(tmp_path / "again", "stdlib").tokens).all()
    for number, (_, text) in enumerate(texts(built, "stdlib")):
        ids = documents.tokens[documents.offsets[number] : documents.offsets[number + 1]].tolist()
        assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
        assert tokenizer.decode(ids[1:-1]) == text
    assert number + 1 == len(documents) == len(MODULES)
    assert json.loads((tmp_path / "tokens" / "meta.json").read_text()) == meta


def test_damaged_token_files_are_refused(built: Path, tmp_path: Path) -> None:
    encode_corpus(built, corpus_tokenizer(built, 512), tmp_path / "tokens")
    with pytest.raises(ValueError, match=r"no encoded source 'wiki'.*stdlib"):
        load_documents(tmp_path / "tokens", "wiki")
    path = tmp_path / "tokens" / "stdlib.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match="its offsets say"):
        load_documents(tmp_path / "tokens", "stdlib")
