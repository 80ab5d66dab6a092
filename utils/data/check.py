"""데이터의 흔한 잘못을 찾는 검사. 행을 하나씩 보므로 파일이 커도 메모리를 더 쓰지 않는다."""

import re
from pathlib import Path

import numpy as np

from utils.chat_settings import CHAT
from utils.data.columns import Form
from utils.data.encoding import detect_encoding
from utils.data.forms import unpacked
from utils.data.pair_check import PairCheck, find_long
from utils.data.preferences import Pair
from utils.data.readers import BINARY
from utils.data.row_check import row_faults
from utils.data.tables import unread_sheets
from utils.data.talks import READ_KEYS
from utils.data.texts import END_TOKEN
from utils.turns import Pieces, Turn

N_EXAMPLES, N_UNUSED = 5, 20
# 종류 -> 사람에게 보이는 말. 적힌 차례로 보인다.
KINDS = {
    "encoding": "UTF-8이 아니어서 바꾸어 읽은 행",
    "sheets": "읽지 않은 시트(시트 하나만 읽는다. 한 시트에 모은다)",
    "guessed": "질문과 답으로 읽은 열",
    "broken": "읽을 수 없는 행",
    "unused": "쓰지 않는 열",
    "missing": "필요한 열이 없거나 글이 아닌 행",
    "empty": "질문이나 답이 빈 행",
    "disliked": "label이 False(나쁜 답)인 행(학습은 거절한다)",
    "roles": "대화의 role이나 차례나 weight를 읽을 수 없는 행(학습은 거절한다)",
    "template": "대화 템플릿이 받지 않거나 글을 바꾸는 행(학습은 거절한다)",
    "divided": "앞의 답이 다음 차례에서 달라지는 템플릿이라 배우는 답마다 문서 하나로 나눈 행",
    "cut_talk": "길어서 앞의 주고받음을 덜어 낸 대화(system은 남긴다)",
    "same_pair": "고른 답과 버린 답이 같은 쌍(배울 것이 없어 뺀다)",
    "swapped_pair": "앞의 쌍과 고른 답, 버린 답이 서로 바뀐 쌍",
    "length_bias": "고른 답과 버린 답의 길이가 크게 다르다. 좋은 답이 아니라 길이를 배울 수 있다",
    "long_pair": "두 답을 합쳐 블록보다 길어 빼는 쌍",
    "unlearned": "weight 0이어서 배우지 않는 답이 든 행",
    "duplicate": "앞의 행과 똑같은 행",
    "overlap": "학습에도 같은 질문이 있는 검증 행",
    "swapped": "질문과 답의 열이 바뀐 것 같다(답이 대부분 물음표로 끝난다)",
    "wrong_column": "답의 열이 글이 아닌 것 같다(대부분 주소, 수, 번호다)",
    "ignored_column": "쓰지 않는 열이 답보다 훨씬 길다. 답의 열을 잘못 고른 것일 수 있다",
    "copied": "답이 질문과 똑같은 행",
    "placeholder": "답이 nan, null, TODO 따위인 행",
    "off_template": "글이 템플릿을 따르지 않는 행(글 그대로 배운다)",
    "glued": "두 행이 한 행으로 붙은 것 같은 행",
    "end_missing": "다른 행과 달리 끝 토큰이 없는 행(도중에 잘린 글일 수 있다)",
    "end_doubled": "끝 토큰이 겹친 행(하나로 보고 읽는다)",
    "end_inside": "끝 토큰이 글 가운데에 있는 행",
    "foreign_end": "다른 모델의 끝 토큰으로 끝나는 행",
    "nfd": "풀어쓴 한글(NFD)이 든 행(모아쓰고 읽는다)",
    "mojibake": "글자가 깨진 것 같은 행",
    "control": "보이지 않는 제어 문자가 든 행",
    "escaped": "줄바꿈이 \\n이라는 두 글자로 적힌 행",
    "long": "블록보다 길어 잘리는 행(끝 토큰은 남긴다)",
    "answer_cut": "질문만으로 블록이 차서 답이 남지 않는 행",
}
ASKING = ("?", "？")  # 묻는 글의 끝. 뒤의 것은 전각이다
_NOT_PROSE = re.compile(r"(?:https?://\S+|[\d.,:/%+-]+|[0-9a-fA-F-]{8,})")


class Inspector:
    """행을 하나씩 보며 이상한 것을 센다.

    Attributes:
        found: 종류 -> {"count": 행의 수, "rows": 앞의 몇 행의 번호}. 파일 전체에 대한 것이면 "rows"가 비고
            "note"가 있을 수 있다.
        n_rows, n_skipped: 본 행과, 읽을 수 없거나 쓸 수 없어 건너뛴 행의 수.
        first_error: 쓸 수 없는 첫 행의 오류.
    """

    def __init__(self, prompter, source: str | Path):
        self.found: dict[str, dict] = {}
        self.n_rows, self.n_skipped, self.pairs = 0, 0, PairCheck()
        self.first_error: Exception | None = None
        self._source, self._is_chat = Path(source), prompter.name == CHAT
        self._head = prompter.template.get("prompt_no_input", "").split("{instruction}")[0].rstrip()
        self._glued = re.compile("^" + re.escape(self._head), re.MULTILINE) if self._head.strip() else None
        self._frame = len(prompter.prompt("가").rstrip(" ")) - 1 if self._head else 0
        self._ends = self._questions_asked = self._answers_asked = self._not_prose = self._ignored_longer = 0
        self._exchanges_cut = 0
        self._unended: dict = {"count": 0, "rows": []}
        self._unused: set[str] = set()
        self._guessed: list[str] = []
        self._ignored: set[str] = set()

    def look(self, number: int, row: dict, form: Form, turns: list[Turn], documents: list[Pieces]) -> None:
        """쓸 수 있는 행 하나를 본다. `turns`와 `documents`는 그 행을 읽고 템플릿으로 말한 것이다."""
        self.n_rows += 1
        raw = [text for name in form.columns.values() for text in _strings(row.get(name))]
        pairs = documents[0] if turns[0].role == "text" else _pairs(turns)
        for kind in row_faults(raw, pairs, self._frame if turns[0].role == "text" else 0):
            self._count(kind, number)
        if not form.is_preference and not all(turn.learned for turn in turns):
            self._count("unlearned", number)
        if len(documents) > 1:
            self._count("divided", number)
        if turns[0].role == "text" and self._is_chat:
            self._count("off_template", number)
        elif turns[0].role == "text":
            self._look_at_text(number, raw[0], *pairs[0])
        self._look_at_columns(row, form, *pairs[-1])

    def look_at_pair(self, number: int, row: dict, form: Form, pair: Pair) -> None:
        """선호 쌍 하나를 본다."""
        self.look(number, row, form, pair.better, [pair.chosen])
        for kind in self.pairs.look(pair):
            self._count(kind, number)

    def cut(self, number: int, n_exchanges: int) -> None:
        """앞에서 주고받음 `n_exchanges`번을 덜어 낸 행 하나를 센다."""
        self._count("cut_talk", number)
        self._exchanges_cut += n_exchanges

    def broken(self, number: int, reason: str) -> None:
        """읽을 수 없는 행 하나를 센다. 첫 이유를 남긴다."""
        self.n_skipped += 1
        self._count("broken", number)
        self.found["broken"].setdefault("note", reason)

    def unusable(self, number: int, error: Exception) -> None:
        """쓸 수 없는 행 하나를 센다. `error.kind`가 그 종류다."""
        self.n_skipped += 1
        self.first_error = self.first_error or error
        self._count(error.kind, number)

    def finish(self) -> dict[str, dict]:
        """파일 전체를 보아야 아는 것을 더하고 `found`를 돌려준다."""
        if self._unended["count"] and self._ends:
            self.found["end_missing"] = self._unended
        if self._guessed:
            self.found["guessed"] = {"count": len(self._guessed), "rows": [], "note": ", ".join(self._guessed)}
        if self._unused:
            shown = sorted(self._unused)[:N_UNUSED]
            more = ", ..." if len(self._unused) > N_UNUSED else ""
            self.found["unused"] = {"count": len(self._unused), "rows": [], "note": ", ".join(shown) + more}
        if "cut_talk" in self.found:
            self.found["cut_talk"]["note"] = f"주고받음 {self._exchanges_cut:,}번"
        self.found |= self.pairs.finish()
        if self.n_rows >= 5:
            if self._answers_asked > 0.6 * self.n_rows and self._questions_asked < 0.4 * self.n_rows:
                self.found["swapped"] = {"count": self._answers_asked, "rows": []}
            if self._not_prose > 0.6 * self.n_rows:
                self.found["wrong_column"] = {"count": self._not_prose, "rows": []}
            if self._ignored_longer > 0.6 * self.n_rows:
                names = ", ".join(sorted(self._ignored))
                self.found["ignored_column"] = {"count": self._ignored_longer, "rows": [], "note": names}
        if self._source.is_file() and self._source.suffix.lower() not in BINARY:
            encoding = detect_encoding(self._source)
            if encoding not in ("utf-8", "utf-8-sig"):
                self.found["encoding"] = {"count": self.n_rows, "rows": [], "note": encoding.upper()}
        if self._source.suffix.lower() == ".xlsx" and (sheets := unread_sheets(self._source)):
            self.found["sheets"] = {"count": len(sheets), "rows": [], "note": ", ".join(sheets)}
        return self.found

    def _look_at_text(self, number: int, raw: str, prompt: str, answer: str) -> None:
        stripped = raw.rstrip()
        if stripped.endswith(END_TOKEN):
            self._ends += 1
            if stripped.removesuffix(END_TOKEN).rstrip().endswith(END_TOKEN):
                self._count("end_doubled", number)
        else:
            _add(self._unended, number)
        if self._head and not prompt.startswith(self._head):
            self._count("off_template", number)
        elif self._glued and self._glued.search(answer):
            self._count("glued", number)

    def _look_at_columns(self, row: dict, form: Form, question: str, answer: str) -> None:
        self._guessed = form.guessed
        answer = answer.strip()
        self._answers_asked += answer.endswith(ASKING)
        self._not_prose += bool(_NOT_PROSE.fullmatch(answer))
        unused = {str(name) for name in form.unused(row)}
        self._unused |= unused | unread_keys(row, form)
        if "text" in form.columns:
            self._questions_asked += "?" in question
            return
        self._questions_asked += question.rstrip().endswith(ASKING)
        ignored = {name for name in unused if isinstance(row.get(name), str)
                   and len(row[name]) > max(80, 4 * len(answer))}
        self._ignored_longer += bool(ignored)
        self._ignored |= ignored

    def _count(self, kind: str, number: int) -> None:
        _add(self.found.setdefault(kind, {"count": 0, "rows": []}), number)


def document_faults(documents, train: np.ndarray, held_out: np.ndarray) -> dict[str, dict]:
    """토큰으로 바꾼 문서들을 비교해야 보이는 것: 같은 행, 나뉜 양쪽에 있는 질문, 긴 행."""
    _, first, same = np.unique(documents.digests, return_index=True, return_inverse=True)
    repeated = documents.numbers != documents.numbers[first][same]  # 한 행의 문서들은 digest가 같다
    repeated = documents.asked(np.arange(len(documents))[repeated])
    shared = documents.asked(held_out[np.isin(documents.questions[held_out], documents.questions[train])])
    kinds = [("duplicate", repeated, ""), ("overlap", shared, "")]
    if documents.pairs:  # 쌍은 자르지 않고 뺀다
        kinds.append(("long_pair", *find_long(documents)))
    else:
        long = np.flatnonzero(documents.full_lengths() > documents.lengths())
        fits = int(np.quantile(documents.full_lengths(), 0.99, method="higher"))
        kinds.append(("long", long, f"{len(long) / len(documents):.1%}, 99%가 들어가는 cutoff_len은 {fits}"))
        kinds.append(("answer_cut", [index for index in long if not documents.document(index).learned[:-1].any()], ""))
    found = {}
    for kind, members, note in kinds:
        if len(members):
            rows = [int(documents.numbers[index]) for index in members[:N_EXAMPLES]]
            found[kind] = {"count": len(members), "rows": rows, **({"note": note} if note else {})}
    return found


def short_lines(found: dict[str, dict]) -> list[str]:
    """찾은 것만 한 줄씩. 없으면 빈 목록이다."""
    lines = []
    for kind, words in KINDS.items():
        if kind in found:
            note = f" [{found[kind]['note']}]" if "note" in found[kind] else ""
            numbers = found[kind]["rows"]
            more = ", ..." if found[kind]["count"] > len(numbers) else ""
            where = f": {', '.join(map(str, numbers))}{more}번째 행" if numbers else ""
            lines.append(f"  {words}{note} {found[kind]['count']:,}개{where}")
    return lines


def unread_keys(row: dict, form: Form) -> set[str]:
    """대화의 글마다 적혀 있지만 읽지 않는 것(reasoning_content 따위)의 이름. 빈 값은 적지 않은 것이다."""
    name = form.columns.get("talk")
    messages = unpacked(row.get(name)) if name else None
    return {f"{name}의 {key}" for message in messages if isinstance(message, dict) for key, value in message.items()
            if key not in READ_KEYS and value not in (None, "", [])} if isinstance(messages, list) else set()


def _strings(value: object) -> list[str]:
    """열 하나에 적힌 글들. 대화의 목록이면 글마다 하나다."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for name in ("content", "value", "text") for text in _strings(value.get(name))]
    return [text for each in value for text in _strings(each)] if isinstance(value, list | tuple) else []


def _pairs(turns: list[Turn]) -> Pieces:
    """(질문, 답)들."""
    said = [turn for turn in turns if turn.role != "system"]
    return [(f"{asked.text}\n{asked.input}" if asked.input else asked.text, answer.text)
            for asked, answer in zip(said[::2], said[1::2], strict=True)]


def _add(entry: dict, number: int) -> None:
    entry["count"] += 1
    if len(entry["rows"]) < N_EXAMPLES:
        entry["rows"].append(number)
