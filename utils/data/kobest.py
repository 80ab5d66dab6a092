"""KoBEST의 다섯 시험의 행. 어느 시험인지는 열 이름이 정한다: hub의 열이나, 저장소에서 받은 TSV의 열."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

KOBEST, KOBEST_HUB = "kobest", "skt/kobest_v1"
WORDS = {"true": 1, "false": 0}  # 정답을 참과 거짓으로 적은 것


def is_on_hub(name: str) -> bool:
    """hub에서 받는 KoBEST의 이름인지."""
    return name in (KOBEST, KOBEST_HUB)


@dataclass(frozen=True)
class Asked:
    """템플릿 없이 물을 글, 보기들, 정답인 보기의 번호(0부터)."""

    text: str
    options: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Task:
    """시험 하나를 읽는 법. 글의 모양은 lm-evaluation-harness의 kobest 과제와 같다.

    Attributes:
        columns: hub의 열 이름들. 마지막이 정답이다.
        in_tsv: 저장소에서 내려받은 TSV의 열 이름들. `columns`와 같은 차례다.
        ask: 행에서 물을 글.
        options: 행에서 보기들.
        first: TSV의 정답이 세기 시작하는 수.
        by_length: 로그 가능도를 보기의 글자 수로 나눈 점수도 낸다.
        own_options: 보기가 행마다 다른 글이다. 정답만으로는 고르기를 배우지 못해 선호 쌍으로 배운다.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    in_tsv: tuple[str, ...]
    ask: Callable[[dict], str]
    options: Callable[[dict], tuple[str, ...]]
    first: int = 0
    by_length: bool = False
    own_options: bool = False

    def read(self, row: dict) -> Asked:
        """hub의 열 이름으로 적힌 행에서 물을 것.

        Raises:
            ValueError: 정답이 아닌 열이 비었거나, 정답이 보기의 번호가 아니다.
        """
        for name in self.columns[:-1]:
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise ValueError(f"{name} 열이 글이 아니거나 비었다")
        text, options, label = self.ask(row), self.options(row), str(row[self.columns[-1]]).strip()
        answer = options.index(label) if label in options else _number(label)
        if not 0 <= answer < len(options):
            raise ValueError(f"정답({label})이 보기의 번호가 아니다")
        return Asked(text, options, answer)

    def renamed(self, row: dict) -> dict | None:
        """hub의 열 이름으로 고친 행. 이 시험의 행이 아니면 None이다."""
        if row.keys() >= set(self.columns):
            return row
        if not row.keys() >= set(self.in_tsv):
            return None
        renamed = {name: row[old] for name, old in zip(self.columns, self.in_tsv, strict=True)}
        with contextlib.suppress(ValueError):  # 번호가 아닌 정답은 물을 것을 읽을 때 말한다
            renamed[self.columns[-1]] = _number(renamed[self.columns[-1]]) - self.first
        return renamed


def _because(question: str) -> str:
    """COPA에서 묻는 것(원인이나 결과)을 잇는 말."""
    words = {"원인": "왜냐하면", "결과": "그래서"}
    if question.strip() not in words:
        raise ValueError(f"question 열이 {', '.join(words)} 가운데 하나가 아니다({question[:40]})")
    return words[question.strip()]


def _number(label: object) -> int:
    """정답으로 적힌 수. 참과 거짓은 1과 0이다.

    Raises:
        ValueError: 정수가 아니다.
    """
    text = str(label).strip()
    with contextlib.suppress(ValueError):
        number = float(WORDS.get(text.lower(), text))
        if number.is_integer():
            return int(number)
    raise ValueError(f"정답({text[:40]})이 보기의 번호가 아니다")


_ENDINGS = ("ending_1", "ending_2", "ending_3", "ending_4")
TASKS = (
    Task("boolq", "BoolQ", ("paragraph", "question", "label"), ("Text", "Question", "Answer"),
         lambda row: f"{row['paragraph']} 질문: {row['question']} 답변: ", lambda row: ("아니오", "예")),
    Task("copa", "COPA", ("premise", "question", "alternative_1", "alternative_2", "label"),
         ("sentence", "question", "1", "2", "Answer"),
         lambda row: f"{row['premise']}  {_because(row['question'])}",
         lambda row: (row["alternative_1"], row["alternative_2"]), first=1, own_options=True),
    Task("hellaswag", "HellaSwag", ("context", *_ENDINGS, "label"),
         ("context", "choice1", "choice2", "choice3", "choice4", "label"),
         lambda row: f"문장: {row['context']}", lambda row: tuple(row[name] for name in _ENDINGS), by_length=True,
         own_options=True),
    Task("sentineg", "SentiNeg", ("sentence", "label"), ("Text", "Label"),
         lambda row: f"문장: {row['sentence']} 긍부정:", lambda row: ("부정", "긍정")),
    Task("wic", "WiC", ("word", "context_1", "context_2", "label"), ("Target", "SENTENCE1", "SENTENCE2", "ANSWER"),
         lambda row: (f"문장1: {row['context_1']} 문장2: {row['context_2']} "
                      f"두 문장에서 {row['word']}가 같은 뜻으로 쓰였나?"), lambda row: ("아니오", "예")),
)


def task_of(row: dict, source: str | Path) -> Task | None:
    """배울 행이 KoBEST의 문항이면 어느 시험인지. 정답은 번호(참과 거짓)로 적혀 있어야 한다.

    열이 둘뿐인 시험(sentence와 label)은 사용자의 표도 그런 이름이므로, 파일이나 hub의 이름까지 본다.
    """
    name = str(source).lower()
    for task in TASKS:
        renamed = task.renamed(row)
        if renamed is None or (len(task.columns) == 2 and not any(known in name for known in (KOBEST, task.name))):
            continue
        with contextlib.suppress(ValueError):
            asked = task.read(renamed)
            if str(renamed[task.columns[-1]]).strip() not in asked.options:
                return task
    return None
