"""고쳐 쓴 데이터 파일. 고칠 수 있는 행은 고치고 나머지는 뺀다. 입력 파일은 건드리지 않는다."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from utils.data import columns, encoder, forms, row_check, rows, texts
from utils.data.dataset import say_pair, say_row
from utils.data.texts import END_TOKEN
from utils.errors import UsageError
from utils.files import staged_file
from utils.turns import Pieces

# 잘못 읽은 글자 -> 원래의 바이트. cp1252가 비워 둔 다섯 자리는 브라우저와 편집기가 하듯이 번호 그대로 읽힌 것이다
_CP1252 = {bytes([byte]).decode("cp1252", "ignore") or chr(byte): byte for byte in range(256)}
_LATIN1 = {chr(byte): byte for byte in range(256)}


@dataclass(frozen=True)
class Repaired:
    """고쳐 쓴 행의 수: 쓴 행, 그 가운데 고친 행, 버린 행."""

    written: int
    changed: int
    dropped: int


def check_target(source: str | Path, target: str | Path) -> None:
    """고친 파일을 쓸 자리가 비었는지 본다. 있는 파일 위에는 쓰지 않는다."""
    if Path(target).suffix.lower() != ".jsonl":
        raise UsageError(f"repair_data는 .jsonl로 끝나야 한다: {target}")
    if Path(target).exists():
        same = Path(source).exists() and Path(target).samefile(source)
        why = "입력 파일 위에는 쓰지 않는다" if same else "이미 있는 파일이다"
        raise UsageError(f"repair_data에 쓸 수 없다. {why}: {target}. 다른 이름을 적는다")


def repair(source: str | Path, target: str | Path, prompter, cache_dir: str | None = None) -> Repaired:
    """고칠 수 있는 행은 고치고, 쓸 수 없는 행과 되풀이된 행은 빼고 .jsonl로 쓴다. 다 쓴 뒤에야 제 이름을 준다.

    Raises:
        UsageError: 남는 행이 없거나 파일을 쓸 수 없다.
    """
    check_target(source, target)
    counts, seen, form = {"written": 0, "changed": 0, "dropped": 0}, set(), None

    def drop(number: int, reason: str) -> None:
        counts["dropped"] += 1

    with staged_file(Path(target), "고친 파일을 쓰지 못했다") as stream:
        for number, row in rows.read_rows(source, cache_dir, drop):
            form = form or columns.form_of(row, source)
            forms.require_alike(row, form, number, source)
            fixed = fix_row(row, form, prompter)
            try:
                said = read_fixed(fixed, form, prompter, number, source)
            except UsageError as error:
                drop(number, str(error))
                continue
            digest = encoder.content_digest(said.pieces)
            is_repeated = len(set(said.answers)) < len(said.answers)  # 선호 쌍의 두 답이 같다
            if digest in seen or is_repeated or any(map(row_check.is_placeholder, said.answers)):
                drop(number, "")
                continue
            seen.add(digest)
            counts["written"] += 1
            counts["changed"] += fixed != row
            stream.write(json.dumps(fixed, ensure_ascii=False, default=str) + "\n")
        if not counts["written"]:
            raise UsageError(f"{source}에 쓸 수 있는 행이 하나도 없어 고친 파일을 쓰지 않았다")
    return Repaired(**counts)


class Fixed(NamedTuple):
    """고친 행의 문서의 조각들과 마지막 답. 선호 쌍이면 두 문서의 조각을 이은 것이고 답이 둘이다."""

    pieces: Pieces
    answers: list[str]


def read_fixed(row: dict, form: columns.Form, prompter, number: int, source: str | Path) -> Fixed:
    """고친 행을 템플릿으로 말해 본다.

    Raises:
        UsageError: 쓸 수 없는 행이다.
    """
    if form.is_preference:
        pair = say_pair(prompter, row, form, number, source)
        answers = [turns[-1].text.strip() for turns in (pair.better, pair.worse)]
        return Fixed([*pair.chosen, *pair.rejected], answers)
    turns, documents = say_row(prompter, forms.read_row(row, form, number, source), number, source)
    pieces = documents[-1]
    answer = pieces[-1][1] if turns[0].role == "text" else turns[-1].text
    return Fixed(pieces, [answer])


def fix_row(row: dict, form: columns.Form, prompter) -> dict:
    """쓰는 열의 글을 고친 행. 다른 열은 그대로 둔다."""
    name = form.columns.get("text")
    if name is not None and isinstance(row.get(name), str):
        text = texts.strip_end(texts.compose(row[name]))
        prompt, answer = prompter.split(text) or ("", text)
        return {**row, name: f"{fix_text(prompt)}{fix_text(answer)}{END_TOKEN}"}
    return {**row, **{name: fix_value(row[name]) for name in form.columns.values() if name in row}}


def fix_value(value: object) -> object:
    """글이면 고친 글, 대화의 목록이면 글마다 고친 목록."""
    if isinstance(value, list):
        return [fix_value(each) for each in value]
    if isinstance(value, dict):
        return {key: fix_value(each) if key in ("content", "value", "text") else each for key, each in value.items()}
    return fix_text(value)


def fix_text(value: object) -> object:
    """한글을 모아쓰고, 깨진 글자를 되돌리고, 제어 문자와 끝 토큰을 뺀다. 글이 아닌 값은 그대로 둔다."""
    if not isinstance(value, str):
        return value
    text = row_check.CONTROL.sub("", texts.compose(ungarble(value)))
    text = texts.strip_end(row_check.FOREIGN_END.sub("", texts.strip_end(text)))
    return text.replace("\\n", "\n") if "\n" not in text and text.count("\\n") >= 2 else text


def ungarble(text: str) -> str:
    """UTF-8이나 CP949를 latin-1 계열로 잘못 읽은 글을 되돌린다. 되돌릴 수 없으면 그대로 둔다."""
    if not row_check.is_garbled(text):
        return text
    for wrong, right in ((_CP1252, "utf-8"), (_LATIN1, "utf-8"), (_LATIN1, "cp949")):
        try:
            restored = bytes(wrong[char] for char in text).decode(right)
        except (KeyError, UnicodeError):
            continue
        if not row_check.is_garbled(restored):
            return restored
    return text
