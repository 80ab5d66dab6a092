"""데모의 미세조정이 배울 질문과 답을 짓는다: 반말을 존댓말로, 수와 금액과 시각과 날짜 읽기, 낱말의 뜻.

사용법: python resources/polyglot-ko-demo/demo_rows.py [쓸 파일]
"""

import json
import random
import sys
from pathlib import Path

from korean import attach, josa, read_date, read_number, read_time
from sentences import Writer

HERE = Path(__file__).resolve().parent
ROWS_FILE = HERE.parents[1] / "ko-datasets" / "polyglot-ko-skills.json"
MAX_DIGITS = 5
DAYS = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
POLITE_ASKS = ("존댓말로 바꿔 줘: {}", "존댓말로 고쳐 줘: {}")
NUMBER_ASKS = ("숫자를 읽어 줘: {}", "{}{} 어떻게 읽어?")
PRICE_ASK, TIME_ASK, DATE_ASK = "금액을 읽어 줘: {}", "시각을 읽어 줘: {}", "날짜를 읽어 줘: {}"
MEANING_ASKS = ("{}{} 뭐지?", "{}{} 뭐야?", "{}{} 무엇이야?")
EXAMPLE_WORD = "AI"  # 페이지의 예시가 묻는 낱말. 더 여러 가지로 물어 꼭 익힌다
_ASKS = ("뭐지", "뭐야", "무엇이야", "어떤 거야", "무슨 뜻이야", "뭘까", "뭔가요", "뭐예요", "무엇인가요")
_TELLS = ("무엇인지 알려 줘", "무엇인지 말해 줘", "뭔지 알려 줘", "뭔지 말해 줘")
MORE_ASKS = (*(f"{{}}{head} {tail}" for head in ("가", "는", "") for tail in (
    *(ask + mark for ask in _ASKS for mark in ("?", "")), *_TELLS)),
    "{}를 설명해 줘", "{}의 뜻은?", "{}의 뜻을 알려 줘", "{}의 뜻을 말해 줘")
EXAMPLES = ("나는 어제 도서관에서 책을 읽었어.", "3,482")  # 페이지의 나머지 예시. 배운 적이 없어야 한다
ROWS_SEED = 7
N_POLITE, N_NUMBERS, N_PRICES, N_TIMES, N_DATES = 2400, 1300, 300, 250, 150
N_WORDS = 20  # 뜻을 묻는 낱말의 수


def make_rows(seed: int = ROWS_SEED) -> dict[str, tuple[str, str]]:
    """묻는 것 -> (질문, 답). 묻는 문장과 수와 시각과 날짜는 한 번씩만 나오고, 낱말의 뜻만은 여러 가지로 묻는다."""
    rng = random.Random(seed)
    writer = Writer(rng)
    rows = {}

    def fill(count: int, make) -> None:
        """묻는 것이 처음 나온 행을 `count`개 더한다. `make`는 (묻는 것, 질문, 답)을 짓는다."""
        enough = len(rows) + count
        while len(rows) < enough:
            item, question, answer = make()
            if item not in rows and item not in EXAMPLES:
                rows[item] = (question, answer)

    def polite():
        said = writer.sentence()
        return said.casual, rng.choice(POLITE_ASKS).format(said.casual), said.polite

    def number():
        written, spoken = spell_number(pick_number(rng, 3))
        return written, rng.choice(NUMBER_ASKS).format(written, josa(spoken, "은/는")), spoken

    def price():
        written, spoken = spell_number(pick_number(rng, 3))
        return written, PRICE_ASK.format(f"{written}원"), f"{spoken} 원"

    def time():
        written, spoken = pick_time(rng)
        return written, TIME_ASK.format(written), spoken

    def date():
        written, spoken = pick_date(rng)
        return written, DATE_ASK.format(written), spoken

    fill(N_POLITE, polite)
    fill(N_NUMBERS, number)
    fill(N_PRICES, price)
    fill(N_TIMES, time)
    fill(N_DATES, date)
    for word, meaning in known_words()[:N_WORDS]:
        for ask in (*MEANING_ASKS, *(MORE_ASKS if word == EXAMPLE_WORD else ())):
            question = ask.format(word, josa(word, "이/가"))
            rows[question] = (question, f"{attach(word, '은/는')} {meaning}입니다.")
    asked = list(rows)
    rng.shuffle(asked)
    return {each: rows[each] for each in asked}


def known_words() -> list[tuple[str, str]]:
    """(낱말, 뜻). 기반 모델이 글로 외우는 것 전부다."""
    lines = (HERE / "definitions.txt").read_text(encoding="utf-8").splitlines()
    return [tuple(line.split("|")) for line in lines]


def spell_number(number: int) -> tuple[str, str]:
    """(세 자리마다 쉼표를 찍은 수, 읽은 소리)."""
    return f"{number:,}", read_number(number)


def pick_number(rng: random.Random, least_digits: int = 1) -> int:
    """자릿수를 먼저 고르고(긴 것을 더 자주) 수를 고른다. 때로 0이 많은 수를 고른다."""
    lengths = range(least_digits, MAX_DIGITS + 1)
    digits = rng.choices(lengths, lengths)[0]
    number = rng.randrange(10 ** (digits - 1), 10**digits)
    if rng.random() < 0.3:
        number = int("".join(d if at == 0 or rng.random() < 0.5 else "0" for at, d in enumerate(str(number))))
    return number


def pick_time(rng: random.Random) -> tuple[str, str]:
    """(적은 시각, 읽은 시각)."""
    half, hour, minute = rng.choice(("오전", "오후")), rng.randint(1, 12), rng.randint(1, 59)
    return f"{half} {hour}시 {minute}분", f"{half} {read_time(hour, minute)}"


def pick_date(rng: random.Random) -> tuple[str, str]:
    """(적은 날짜, 읽은 날짜)."""
    month = rng.randint(1, 12)
    day = rng.randint(1, DAYS[month - 1])
    return f"{month}월 {day}일", read_date(month, day)


def main(file: Path = ROWS_FILE) -> None:
    lines = (json.dumps({"instruction": ask, "output": answer}, ensure_ascii=False) for ask, answer in
             make_rows().values())
    file.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
