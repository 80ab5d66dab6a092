"""대화 템플릿에 넘기는 값: 생각을 켤지(enable_thinking)와, 템플릿이 적을 날짜(date)."""

import datetime
import re
from typing import NamedTuple

from utils.errors import UsageError

CHAT = "chat"
THINKS, DATE = "enable_thinking", "date"  # 템플릿의 JSON에 적을 수 있는 것
_TODAY = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")  # 템플릿이 오늘을 적는 자리와 그 형식


class ChatSettings(NamedTuple):
    """대화 템플릿 하나의 설정.

    Attributes:
        template: prompt.json에 담을 것: name, 그리고 정했으면 enable_thinking과 date.
        variables: 템플릿에 넘길 이름과 값.
        source: 쓸 템플릿(Jinja). 오늘을 적는 자리에 정한 날짜가 들어 있다.
    """

    template: dict
    variables: dict
    source: str


def read_settings(template: dict, source: str) -> ChatSettings:
    """템플릿의 JSON에서 설정을 읽는다.

    오늘의 날짜를 적는 템플릿(Llama 3.2)이면 날짜를 하나로 정한다. 그대로 두면 배운 글과 물을 때의 글이 날마다 다르고,
    글의 해시로 나누는 검증 행도 날마다 달라져 배운 행이 섞인다.

    Args:
        template: {"name": "chat"}과, 있으면 enable_thinking(bool)과 date("2026-11-29"). date가 없으면 오늘이다.
        source: 토크나이저에 든 템플릿.

    Raises:
        UsageError: 값이 틀렸다.
    """
    kept, variables = {"name": CHAT}, {}
    if THINKS in template:
        if not isinstance(template[THINKS], bool):
            raise UsageError(f"템플릿 {CHAT}의 {THINKS}에는 true나 false를 적는다")
        kept[THINKS] = variables[THINKS] = template[THINKS]
    if not _TODAY.search(source):
        return ChatSettings(kept, variables, source)
    given = template.get(DATE, datetime.date.today().isoformat())
    try:
        day = datetime.date.fromisoformat(given)
    except (TypeError, ValueError):
        raise UsageError(f"템플릿 {CHAT}의 {DATE}에는 2026-11-29처럼 적는다: {given}") from None
    kept[DATE] = day.isoformat()
    return ChatSettings(kept, variables, _TODAY.sub(lambda place: repr(day.strftime(place[2])), source))
