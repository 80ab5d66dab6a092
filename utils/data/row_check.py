"""행 하나의 글에서 보이는 잘못: 깨진 글자, 답의 자리만 있는 답, 잘못 놓인 끝 토큰."""

import re

from utils.data.texts import END_TOKEN, compose
from utils.turns import Pieces

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")
FOREIGN_END = re.compile(r"(?:</s>|<\|(?:im_end|eot_id|end|end_of_text)\|>|<eos>|<pad>|<end_of_turn>|\[EOS\])\s*$")
_CONTINUATION = "\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
_MOJIBAKE = re.compile(f"\ufffd|占쏙옙|[\xea-\xed][{_CONTINUATION}]{{2}}|[\xa1-\xfe]{{6}}")
_QUESTION_MARKS = re.compile(r"\?[가-힣]")
_PLACEHOLDERS = {"nan", "none", "null", "n/a", "undefined", "todo", "tbd", "-", ".", "...",
                 "#n/a", "#ref!", "#value!", "#name?", "#div/0!", "#null!", "#num!"}  # 엑셀이 적는 수식의 오류


def row_faults(raw: list[str], pieces: Pieces, frame: int) -> list[str]:
    """행 하나의 글에서 보이는 잘못의 종류.

    Args:
        raw: 행에 적힌 그대로의 글들.
        pieces: 그 행의 (질문, 답)들.
        frame: 질문에 섞인 템플릿의 글자의 수.
    """
    whole = "\x1e".join(raw)
    answers = [answer.strip() for _, answer in pieces]
    inside = any(END_TOKEN in prompt or END_TOKEN in answer for prompt, answer in pieces)
    # 답이 질문에 들어 있고, 템플릿의 글자를 빼면 질문에 다른 글이 없다
    copied = any(answer in prompt and len(prompt) - len(answer) <= frame
                 for (prompt, _), answer in zip(pieces, answers, strict=True))
    return [kind for kind, wrong in (
        ("copied", copied),
        ("placeholder", any(map(is_placeholder, answers))),
        ("end_inside", inside),
        ("foreign_end", any(FOREIGN_END.search(answer[-20:]) for answer in answers)),
        ("nfd", any(compose(text) is not text for text in raw)),
        ("mojibake", is_garbled(whole)),
        ("control", CONTROL.search(whole.replace("\x1e", ""))),
        ("escaped", any("\n" not in answer and answer.count("\\n") >= 2 for answer in answers)),
    ) if wrong]


def is_placeholder(answer: str) -> bool:
    """nan, null, TODO처럼 답을 적지 않은 자리의 글인가."""
    return answer.strip().lower() in _PLACEHOLDERS


def is_garbled(text: str) -> bool:
    """다른 인코딩으로 잘못 읽은 글처럼 보이는가."""
    if _MOJIBAKE.search(text):
        return True
    marks = _QUESTION_MARKS.findall(text) if text.count("?") >= 3 else []
    return len(marks) >= 3 and len(marks) * 20 >= len(text)
