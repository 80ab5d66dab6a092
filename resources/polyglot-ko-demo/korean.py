"""한국어의 규칙: 받침과 조사, 동사와 형용사의 활용, 수와 날짜와 시각을 읽는 법."""

from dataclasses import dataclass

# 받침의 유니코드 차례. 첫 자리는 받침이 없다는 뜻이다
FINALS = " ㄱㄲㄳㄴㄵㄶㄷㄹㄺㄻㄼㄽㄾㄿㅀㅁㅂㅄㅅㅆㅇㅈㅊㅋㅌㅍㅎ"
HANGUL_START, N_FINALS = ord("가"), len(FINALS)
DIGITS = "영일이삼사오육칠팔구"
PLACES = ("", "십", "백", "천")
HOURS = ("한", "두", "세", "네", "다섯", "여섯", "일곱", "여덟", "아홉", "열", "열한", "열두")
MONTHS = {6: "유", 10: "시"}  # 유월과 시월은 수를 읽는 소리와 다르다
LETTER_FINALS = {"L": "ㄹ", "M": "ㅁ", "N": "ㄴ", "R": "ㄹ"}  # 이름을 부를 때 받침이 있는 로마자


def final_of(text: str) -> str:
    """마지막 글자의 받침. 없으면 공백 한 칸이다."""
    last = text[-1]
    if not "가" <= last <= "힣":
        return LETTER_FINALS.get(last, " ")
    return FINALS[(ord(last) - HANGUL_START) % N_FINALS]


def with_final(text: str, final: str) -> str:
    """마지막 글자의 받침을 바꾼 글."""
    base = ord(text[-1]) - (ord(text[-1]) - HANGUL_START) % N_FINALS
    return text[:-1] + chr(base + FINALS.index(final))


def josa(sound: str, pair: str) -> str:
    """`sound`로 끝나는 말에 맞는 조사. `pair`는 "은/는"처럼 받침이 있을 때와 없을 때의 꼴이다."""
    closed, opened = pair.split("/")
    return opened if final_of(sound) == " " else closed


def attach(noun: str, pair: str) -> str:
    """받침에 맞는 조사를 붙인 말."""
    return noun + josa(noun, pair)


@dataclass(frozen=True)
class Predicate:
    """동사나 형용사 하나의 활용.

    Attributes:
        stem: 어간. "먹", "가", "듣".
        infinitive: "-어"가 붙은 꼴. "먹어", "가", "들어".
        before_eu: "-을"과 "-읍시다"가 붙는 어간. 불규칙일 때만 다르다("듣"은 "들").
        adjective: 형용사면 참이다. 현재의 평서형이 어간에 바로 "다"를 붙인 꼴이다.
    """

    stem: str
    infinitive: str
    before_eu: str
    adjective: bool = False

    @property
    def past(self) -> str:
        return with_final(self.infinitive, "ㅆ")

    @property
    def formal(self) -> str:
        """"-ㅂ니다"나 "-습니다"."""
        final = final_of(self.stem)
        return with_final(self.stem, "ㅂ") + "니다" if final in " ㄹ" else self.stem + "습니다"

    @property
    def plain(self) -> str:
        """글말의 현재 "-다", "-는다", "-ㄴ다"."""
        if self.adjective:
            return self.stem + "다"
        final = final_of(self.stem)
        return with_final(self.stem, "ㄴ") + "다" if final in " ㄹ" else self.stem + "는다"

    @property
    def future(self) -> str:
        """뒤의 말을 꾸미는 "-을"."""
        final = final_of(self.before_eu)
        if final == " ":
            return with_final(self.before_eu, "ㄹ")
        return self.before_eu if final == "ㄹ" and self.before_eu == self.stem else self.before_eu + "을"

    @property
    def together(self) -> str:
        """"-읍시다"."""
        final = final_of(self.before_eu)
        if final == " " or (final == "ㄹ" and self.before_eu == self.stem):
            return with_final(self.before_eu, "ㅂ") + "시다"
        return self.before_eu + "읍시다"


def read_number(number: int) -> str:
    """수를 읽는 소리. 만 단위로 띄어 쓴다. 1 이상 1억 미만."""
    upper, lower = divmod(number, 10_000)
    parts = []
    if upper:
        parts.append(("" if upper == 1 else _read_four(upper)) + "만")
    if lower:
        parts.append(_read_four(lower))
    return " ".join(parts)


def _read_four(number: int) -> str:
    spoken = ""
    for place in range(3, -1, -1):
        digit = number // 10**place % 10
        if digit:
            spoken += ("" if digit == 1 and place else DIGITS[digit]) + PLACES[place]
    return spoken


def read_time(hour: int, minute: int) -> str:
    """시는 우리말 수로, 분은 한자말 수로 읽는다."""
    spoken = f"{HOURS[hour - 1]} 시"
    return f"{spoken} {read_number(minute)} 분" if minute else spoken


def read_date(month: int, day: int) -> str:
    return f"{MONTHS.get(month) or read_number(month)}월 {read_number(day)}일"
