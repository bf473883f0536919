"""Parallel text from gettext catalogues, which the tests write themselves."""

from __future__ import annotations

import gzip
import struct
from collections import Counter
from pathlib import Path

import pytest

from echostream.data.corpus import catalogues
from echostream.data.corpus.catalogues import Limits, prose_pairs, read_catalogue
from echostream.data.corpus.cli import main
from echostream.data.corpus.rows import read_rows
from echostream.errors import ManifestError

HEADER = ("", "Project-Id-Version: x\nContent-Type: text/plain; charset=UTF-8\n")
GOLD = ("We need more gold for the army.", "Necesitamos más oro para el ejército.")


def write_mo(path: Path, entries: list[tuple[str, str]], order: str = "<", encoding: str = "utf-8") -> Path:
    """A .mo file as msgfmt writes it, without its hash table."""
    strings = [[side.encode(encoding) for side in entry] for entry in sorted([HEADER, *entries])]
    tables, data, start = [b"", b""], b"", 28 + 16 * len(strings)
    for side in (0, 1):
        for entry in strings:
            tables[side] += struct.pack(f"{order}2I", len(entry[side]), start + len(data))
            data += entry[side] + b"\0"
    head = struct.pack(f"{order}7I", 0x950412DE, 0, len(strings), 28, 28 + 8 * len(strings), 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + b"".join(tables) + data)
    return path


def pieces(*entries: tuple[str, str], **limits: int) -> list[list[tuple[str, str]]]:
    return list(prose_pairs(entries, Limits(**limits)))


@pytest.mark.parametrize("order", ["<", ">"])
def test_mo_of_either_byte_order(tmp_path: Path, order: str) -> None:
    entries = [GOLD, ("menu\x04Save it.", "Guárdalo."), ("One file.\0Many files.", "Un fichero.\0Muchos ficheros.")]
    read = read_catalogue(write_mo(tmp_path / "a.mo", entries, order))
    assert sorted(read) == sorted([GOLD, ("Save it.", "Guárdalo."), ("One file.", "Un fichero.")])


def test_the_header_names_the_encoding(tmp_path: Path) -> None:
    path = write_mo(tmp_path / "a.mo", [GOLD], encoding="latin-1")
    with pytest.raises(ManifestError, match="a.mo cannot be read: 'utf-8' codec"):
        read_catalogue(path)
    path.write_bytes(path.read_bytes().replace(b"UTF-8", b"CP819"))
    assert read_catalogue(path) == [GOLD]


def test_po(tmp_path: Path) -> None:
    path = tmp_path / "es.po"
    path.write_text(
        'msgid ""\nmsgstr "Content-Type: text/plain; charset=UTF-8\\n"\n\n#: a.c:1\nmsgctxt "menu"\nmsgid ""\n'
        '"Two "\n"lines.\\n"\nmsgstr "Dos \\"líneas\\"."\n\n#, fuzzy\nmsgid "Guess."\nmsgstr "Quizás."\n'
        'msgid "One."\nmsgid_plural "%d."\nmsgstr[0] "Uno."\nmsgstr[1] "%d."\n\nmsgid "New."\nmsgstr ""\n'
        '#~ msgid "Old."\n#~ msgstr "Viejo."\n',
        encoding="utf-8",
    )
    assert read_catalogue(path) == [("Two lines.\n", 'Dos "líneas".'), ("One.", "Uno.")]
    path.write_text('msgid Hello\n"\n', encoding="utf-8")
    with pytest.raises(ManifestError, match="es.po cannot be read: line 2"):
        read_catalogue(path)


@pytest.mark.parametrize("content", [b"", b"no catalogue at all", struct.pack("<7I", 0x950412DE, 0, 9, 28, 99, 0, 0)])
def test_no_catalogue(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.mo").write_bytes(content)
    with pytest.raises(ManifestError, match="catalogue .*a.mo cannot be read"):
        read_catalogue(tmp_path / "a.mo")


@pytest.mark.parametrize(
    "message, translation, reason",
    [
        ("The file %s is not here.", "El fichero %s no está aquí.", "not prose"),
        ("Press _Save to keep the changes.", "Pulse _Guardar para conservar los cambios.", "not prose"),
        ("Please open the <a href=x>page</a> now.", "Por favor abra la <a href=x>página</a> ya.", "not prose"),
        ("Read the file notes.txt before that.", "Lee antes el fichero notes.txt por favor.", "not prose"),
        ("Use the option --force to go on.", "Usa la opción --force para continuar.", "not prose"),
        ("Call openWindow before you draw.", "Llama a openWindow antes de dibujar.", "not prose"),
        ("Open the recent files", "Abrir los ficheros recientes", "no sentence"),
        ("GAME OVER FOR YOU!", "¡FIN DEL JUEGO!", "no sentence"),
        ("Go on.", "Sigue.", "too short"),
        ("We need more gold for the army.", "Ya no nos queda nada de lo que teníamos aquí.", ""),
        ("We need more gold.", "Ya no nos queda nada de lo que hace tiempo teníamos aquí todos.", "unlike lengths"),
        ("We need more gold for the army.", "We need more gold for our army.", "not translated"),
        ("We love Konrad and Delfador.", "Queremos a Konrad y Delfador.", ""),
        ("female^The <b>elf</b> sleeps\nin the forest.", "La <b>elfa</b> duerme en\nel bosque.", ""),
    ],
)
def test_only_prose_is_kept(message: str, translation: str, reason: str) -> None:
    counts: Counter = Counter()
    kept = list(prose_pairs([(message, translation)], counts=counts))
    assert counts == (Counter() if not reason else Counter({reason: 1})) and len(kept) == (not reason)
    if message.startswith("female"):
        assert kept == [[("The elf sleeps in the forest.", "La elfa duerme en el bosque.")]]


def test_fragments_on_request() -> None:
    label = ("Open the recent files", "Abrir los ficheros recientes")
    assert pieces(label) == [] and pieces(label, fragments=True) == [[label]]


def test_long_messages_are_cut_between_sentences() -> None:
    count = 40
    message = " ".join(f"The king number {i} sleeps." for i in range(count))
    translation = " ".join(f"¡El rey número {i} duerme!" for i in range(count))
    lengths = set()
    for title in ("Alas!", "Well.", "Hm.", "So.", "Yes.", "Right.", "Listen."):  # the message decides about the length
        found = pieces((f"{title} {message}", f"¡Ay! {translation}"), max_words=30)
        sentences = [(f"The king number {i} sleeps.", f"¡El rey número {i} duerme!") for i in range(count)]
        assert sum(found, [])[-count:] == sentences
        lengths.add(max(map(len, found)))
        assert all(sum(len(pair[0].split()) for pair in piece) <= 30 for piece in found)
    assert len(lengths) > 2
    # Where the sides part differently the message stays whole, or is left out when it is too long for that.
    merged = ("We are here. They are not.", "Estamos aquí, pero ellos no.")
    assert pieces(merged) == [[merged]] and pieces((message, translation.replace("!", ","))) == []


def test_a_sentence_that_is_no_prose_parts_its_neighbours() -> None:
    found = pieces((f"{GOLD[0]} Press %s. {GOLD[0]}", f"{GOLD[1]} Pulsa %s. {GOLD[1]}"))
    assert found == [[GOLD], [GOLD]]


def test_paragraphs_part_where_both_sides_have_them() -> None:
    assert pieces(("It is one.\n\nThe two of us.", "Eso es uno.\n \nNosotros dos."), min_words=2) == [
        [("It is one.", "Eso es uno.")],
        [("The two of us.", "Nosotros dos.")],
    ]
    assert pieces(("A one.\n\nThe two of us.", "Uno, y nosotros\ndos.")) == [
        [("A one. The two of us.", "Uno, y nosotros dos.")]
    ]


def layout(root: Path) -> Path:
    write_mo(root / "a/locale/es/LC_MESSAGES/game.mo", [GOLD, ("Where are the ships?", "¿Dónde están los barcos?")])
    write_mo(root / "a/locale/es_MX/LC_MESSAGES/game.mo", [("I am not read.", "No me leen nunca.")])
    write_mo(root / "a/locale/fr/LC_MESSAGES/game.mo", [(GOLD[0], "Il faut plus d'or pour l'armée.")])
    write_mo(
        root / "b/es_AR/LC_MESSAGES/tool.mo",
        [(GOLD[0].upper().capitalize(), GOLD[1]), ("The door is shut.", "La puerta está cerrada.")],
    )
    (root / "b" / "levels").mkdir()
    text = 'msgid "Mind the big gap."\nmsgstr "Cuidado con el hueco."\n'
    (root / "b/levels/es.po").write_text(text, encoding="utf-8")
    return root


def test_catalogues_step(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output, held = tmp_path / "pairs.tsv.gz", tmp_path / "held.tsv"
    held.write_text("es\tsplit\nla puerta está cerrada\ttest\n¿Dónde están los barcos?\ttrain\n", encoding="utf-8")
    pair = ["--source-lang", "es", "--target-lang", "en"]
    step = ["catalogues", str(layout(tmp_path / "x")), *pair, "-o", str(output)]
    assert main([*step, "--exclude", str(held)]) == 0
    assert gzip.decompress(output.read_bytes()).decode("utf-8").splitlines() == [
        "es\ten\tcatalogue",
        f"{GOLD[1]}\t{GOLD[0]}\tgame",
        "¿Dónde están los barcos?\tWhere are the ships?\tgame",
        "Cuidado con el hueco.\tMind the big gap.\tlevels/es",
    ]
    assert "3 pairs, 14 words, 2 catalogues; left out: {'held out': 1, 'seen before': 1}" in capsys.readouterr().out

    assert main([*step[:-1], str(tmp_path / "more.tsv"), "--exclude", str(held), str(output)]) == 0  # nothing twice
    assert len((tmp_path / "more.tsv").read_text().splitlines()) == 1
    assert main([*step, "--exclude", str(tmp_path / "gone.tsv")]) == 1
    assert "gone.tsv does not exist" in capsys.readouterr().err

    text = ["text", "--output", str(tmp_path / "c"), "--pairs", str(output), "--train-only", "--vocab-size", "30"]
    assert main(text) == 0
    assert [row.split for row in read_rows(tmp_path / "c" / "rows.tsv")] == ["train"] * 3


def test_either_side_may_be_the_messages(tmp_path: Path) -> None:
    root = layout(tmp_path / "x")
    catalogues.write_pairs(tmp_path / "p.tsv", [root / "a"], "en", "fr")
    assert (tmp_path / "p.tsv").read_text(encoding="utf-8").splitlines()[1].split("\t")[:2] == [
        GOLD[0],
        "Il faut plus d'or pour l'armée.",
    ]
    with pytest.raises(ManifestError, match="messages are 'en' give no pairs fr-es"):
        catalogues.write_pairs(tmp_path / "p.tsv", [root], "fr", "es")
    with pytest.raises(ManifestError, match="no catalogue of 'pl'"):
        catalogues.write_pairs(tmp_path / "p.tsv", [root], "pl", "en")
    with pytest.raises(ManifestError, match="nowhere is not a directory"):
        catalogues.write_pairs(tmp_path / "p.tsv", [tmp_path / "nowhere"], "es", "en")
