"""열 이름에서 행의 꼴(`Form`)을 정한다. 형식을 적는 플래그는 없다."""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from utils.data import kobest, preferences
from utils.data.preferences import PREFERENCES, plain
from utils.errors import UsageError

# 공개된 데이터가 쓰는 (질문, 답)의 열. 앞의 것부터 고른다
PAIRS = (("instruction", "output"), ("instruction", "response"), ("prompt", "completion"), ("prompt", "response"),
         ("question", "answer"), ("query", "response"), ("질문", "답변"), ("질문", "답"), ("질문", "대답"),
         ("질문", "정답"), ("문제", "정답"), ("문제", "답"), ("명령", "출력"), ("지시", "응답"), ("입력", "출력"),
         ("input", "output"), ("q", "a"))
# 위의 짝이 없으면 질문의 이름 하나와 답의 이름 하나를 앞의 것부터 고른다
QUESTIONS = ("instruction", "prompt", "question", "query", "질문", "문의", "질의", "물음", "문제", "명령", "지시",
             "지시문", "요청", "발화", "입력", "input", "q", "사용자", "고객", "user", "human", "내용", "제목")
ANSWERS = ("output", "response", "completion", "answer", "답변", "답", "대답", "정답", "답안", "응답", "출력", "해설",
           "a", "상담원", "상담사", "챗봇", "assistant", "bot")
# 질문과 답은 아니어도 앞을 보고 뒤를 쓰는 짝
OTHERS = (("제목", "내용"), ("제목", "본문"), ("title", "content"), ("원문", "번역"), ("원문", "번역문"),
          ("원문", "요약"), ("source", "target"), ("document", "summary"), ("문장", "라벨"), ("문장", "레이블"),
          ("sentence", "label"))
ENDINGS = (("질문", "문의", "질의"), ("답변", "대답", "응답", "답안", "정답"))  # 고객질문, 상담원 답변
TALKS = ("messages", "conversations", "conversation")
TEXTS = ("text", "텍스트", "본문", "글", "내용", "content")
# 함께 있으면 쓰는 열 -> 그 이름들
EXTRAS = {"input": ("input", "context", "입력", "맥락"), "system": ("system", "system_prompt", "시스템"),
          "history": ("history",)}
SHOWN = ("질문+답변, question+answer, instruction+output, prompt+completion, prompt+chosen+rejected, messages, "
         "conversations, text")
_CLOSE = 0.75  # 이보다 비슷하면 잘못 적은 이름으로 본다
_N_NAMED, _NAME_CHARS = 12, 24  # 오류에 적는 열의 수와 이름의 길이


@dataclass(frozen=True)
class Form:
    """행의 꼴.

    Attributes:
        columns: 뜻 -> 파일에 적힌 열의 이름. 뜻은 "talk"(대화의 목록), "text"(글 하나), "question"과 "answer", 그리고
            `EXTRAS`의 것이다. 선호 쌍이면 "chosen"과 "rejected"가 있고 "answer"는 없다.
        exam: KoBEST의 문항이면 그 시험. 시험이 묻는 글과 정답(보기가 행마다 다르면 다른 보기와의 선호 쌍)을 배우고,
            `columns`의 뜻은 그 시험이 안다.
    """

    columns: dict[str, str]
    exam: kobest.Task | None = None

    @property
    def is_preference(self) -> bool:
        """선호 쌍의 꼴인가."""
        return "chosen" in self.columns or (self.exam is not None and self.exam.own_options)

    @property
    def guessed(self) -> list[str]:
        """공개된 이름이 아니어서 뜻을 짐작한 열이나 KoBEST의 문항. 없으면 비어 있다."""
        if self.exam is not None:
            how = "정답과 다른 보기의 선호 쌍" if self.is_preference else "정답"
            return [f"KoBEST {self.exam.title}의 문항(시험이 묻는 글과 {how}으로 읽는다)"]
        named = [self.columns[meaning] for meaning in ("question", "answer", "text") if meaning in self.columns]
        usual = tuple(map(plain, named)) in (*PAIRS, ("text",))
        return [] if self.is_preference or usual else named

    def unused(self, names: Iterable[str]) -> set[str]:
        """이 꼴이 쓰지 않는 열."""
        return set(names) - set(self.columns.values())


def choose_form(names: Iterable[str]) -> Form | None:
    """열 이름으로 정한 꼴. 아는 이름이 없으면 None이다. 대소문자, 빈칸, 괄호 속의 글은 가리지 않는다."""
    names = [name for name in names if isinstance(name, str)]
    known = {**{plain(name): name for name in reversed(names)}, **{name: name for name in names}}
    columns: dict[str, str] = {}
    answers = preferences.find_answers(tuple(names))
    pair = _first_pair(known, PAIRS[:4])
    talk = next((name for name in TALKS if name in known), None)
    if pair is None and not talk:
        pair = _first_pair(known, PAIRS) or _word_pair(known)
    if answers:
        columns = {"chosen": answers[0], "rejected": answers[1]}
        pair = preferences.asked_column(known)
        if pair:
            columns["question"] = known[pair]
        elif talk:
            columns["talk"] = known[talk]
    elif pair:
        columns = {"question": known[pair[0]], "answer": known[pair[1]]}
    elif talk:
        columns = {"talk": known[talk]}
    else:
        return _whole_form(known)
    for meaning, cousins in EXTRAS.items():
        present = [known[name] for name in cousins if name in known]
        found = next((name for name in present if name not in columns.values()), None)
        if found is not None and (pair or meaning == "system"):
            columns[meaning] = found
    return Form(columns)


def form_of(row: dict, source: str | Path) -> Form:
    """배울 행의 꼴. KoBEST의 문항이면 그 시험이고, 아니면 `require_form`과 같다."""
    task = kobest.task_of(row, source)
    return require_form(row, source) if task is None else Form({name: name for name in map(str, row)}, task)


def require_form(names: Iterable[str], source: str | Path) -> Form:
    """`choose_form`과 같다.

    Raises:
        UsageError: 아는 이름이 없다. 있는 열을 말하고, 잘못 적은 것 같으면 옳은 이름을 묻는다.
    """
    names = [str(name) for name in names]
    form = choose_form(names)
    if form is None:
        guesses = [f"{name} -> {guess}" for name in names if (guess := _closest(name))]
        meant = f" 혹시 이 이름들인가: {', '.join(guesses)}." if guesses else ""
        shown = [name if len(name) <= _NAME_CHARS else f"{name[:_NAME_CHARS]}…" for name in names if name.strip()]
        more = ", …" if len(shown) > _N_NAMED else ""
        raise UsageError(f"{source}의 열을 알 수 없다: {', '.join(shown[:_N_NAMED]) or '없음'}{more}.{meant} 표의 첫 줄"
                         f"(JSON이면 값의 이름)에 이 가운데 하나를 적는다: {SHOWN}")
    return form


def _first_pair(known: dict[str, str], pairs: Iterable[tuple[str, str]]) -> tuple[str, str] | None:
    return next((pair for pair in pairs if known.keys() >= set(pair)), None)


def _word_pair(known: dict[str, str]) -> tuple[str, str] | None:
    """질문의 이름과 답의 이름을 하나씩. 그대로가 없으면 그 말로 끝나는 이름이 하나뿐일 때 그것이다."""
    found = []
    for words, endings in zip((QUESTIONS, ANSWERS), ENDINGS, strict=True):
        ending = [name for name in known if name == plain(name) and name.endswith(endings)]
        found.append(next((word for word in words if word in known), ending[0] if len(ending) == 1 else None))
    return None if None in found else (found[0], found[1])


def _whole_form(known: dict[str, str]) -> Form | None:
    """질문과 답의 이름이 없을 때의 꼴: text, 앞뒤의 짝, 글 하나."""
    pair = None if "text" in known else _first_pair(known, OTHERS)
    if pair:
        return Form({"question": known[pair[0]], "answer": known[pair[1]]})
    text = next((name for name in TEXTS if name in known), None)
    return Form({"text": known[text]}) if text else None


def _closest(name: str) -> str:
    """비슷한 이름. 아는 이름이거나 비슷한 것이 없으면 빈 글이다."""
    named = {name for names in (*PAIRS, *PREFERENCES, *EXTRAS.values()) for name in names}
    every = {*TALKS, "text", *named} - {"q", "a"}  # 한 글자는 무엇과도 비슷하다
    spelled = {unicodedata.normalize("NFD", each): each for each in sorted(every)}  # 한글은 자모로 비교한다
    found = get_close_matches(unicodedata.normalize("NFD", plain(name)), spelled, 1, _CLOSE)
    return spelled[found[0]] if found and spelled[found[0]] != plain(name) else ""
