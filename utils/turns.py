"""대화에서 한 번 말한 글(`Turn`). 파일의 행에서 토큰까지, 모든 템플릿에서 행의 꼴이다. 표준 라이브러리만 쓴다."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Turn:
    """한 사람이 한 번 말한 글.

    Attributes:
        role: "system", "user", "assistant" 가운데 하나. 질문과 답으로 나누지 않은 글이면 "text"다.
        text: 그 글.
        learned: False면 읽기만 하고 배우지 않는 답이다(weight 0).
        input: 질문에 딸린 글(맥락). user에만 있다.
    """

    role: str
    text: str
    learned: bool = True
    input: str = ""
