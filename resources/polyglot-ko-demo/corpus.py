"""기반 모델이 읽을 글을 짓는다. 미세조정의 행에 나오는 문장과 수, 시각, 날짜는 나오지 않는다."""

import random
from collections.abc import Callable

from demo_rows import known_words, pick_date, pick_number, pick_time, spell_number
from korean import attach, josa
from sentences import NAMES, WORDS, Sentence, Writer

END = "<|endoftext|>"
HEADINGS = ("일기", "오늘 있었던 일", "숫자", "시각과 날짜", "낱말", "말하기", "존댓말과 반말", "이야기", "편지",
            "공책")
JOSA = ("은/는", "이/가", "을/를", "과/와")
CASUAL, POLITE, WRITTEN = 0, 1, 2
REGISTERS = (  # 말의 세 꼴을 부르는 이름. 같은 줄의 이름은 함께 쓴다
    ("반말", "존댓말", "글말"), ("편한 말", "높인 말", "글에서"), ("동생에게", "선생님께", "일기에"),
    ("친구에게", "할머니께", "공책에"), ("편하게", "공손하게", "글로"), ("낮춤", "높임", "적기"),
)
SPELLED = (("숫자", "한글"), ("적은 것", "읽은 것"), ("쓰기", "읽기"), ("장부", "소리"), ("적을 때", "읽을 때"))
DICTATIONS = (("선생님이 불러 준 낱말은", "받아쓴 낱말은"), ("칠판에는", "공책에도"), ("불러 주는 말:", "받아쓴 말:"))
DICTATED = ("명사", "명사", "명사", "이름", "곳", "사람", "어떻게", "지난 때")  # 불러 주는 낱말의 갈래


class Corpus:
    """기반 모델이 읽을 글을 끝없이 짓는다. 미세조정의 형식("### 질문:")은 나오지 않는다.

    Args:
        rng: 글을 고르는 난수.
        avoid: 글에 나오면 안 되는 것들. 미세조정의 행에 나오는 반말 문장, 수, 시각, 날짜다.
    """

    def __init__(self, rng: random.Random, avoid: set[str]):
        self._rng, self._avoid = rng, avoid
        self._writer, self._words = Writer(rng), known_words()
        self._nouns = sorted({*NAMES, *WORDS["명사"], *WORDS["곳"], *WORDS["사람"], *WORDS["하는 일"]})
        kinds = ((18, self._registers), (16, self._retold), (7, self._dictation), (5, self._repeated),
                 (4, self._diary), (3, self._talk), (4, self._letter), (12, self._ledger), (6, self._number),
                 (5, self._when), (12, self._noun), (6, self._meaning), (12, self._lookup))
        self._kinds, self._weights = [make for _, make in kinds], [weight for weight, _ in kinds]

    def text(self) -> str:
        text = self._rng.choices(self._kinds, self._weights)[0]()
        heading = f"### {self._rng.choice(HEADINGS)}\n\n" if self._rng.random() < 0.1 else ""
        return heading + text + END

    def _sentence(self) -> Sentence:
        while True:
            sentence = self._writer.sentence()
            if sentence.casual not in self._avoid:
                return sentence

    def _new(self, pick: Callable[[random.Random], tuple[str, str]]) -> tuple[str, str]:
        """`avoid`에 없는 (적은 꼴, 읽은 꼴)."""
        while True:
            written, spoken = pick(self._rng)
            if written not in self._avoid:
                return written, spoken

    def _number_pair(self) -> tuple[str, str]:
        return self._new(lambda rng: spell_number(pick_number(rng)))

    def _when_pair(self) -> tuple[str, str]:
        return self._new(self._rng.choice((pick_time, pick_time, pick_date)))

    def _side_by_side(self, pairs: list[tuple[str, str]], names: tuple[str, str]) -> str:
        """짝을 나란히 적은 공책. 한 글에서는 적는 모양이 같다."""
        left, right = names
        line = self._rng.choice((
            "{left}: {x}\n{right}: {y}", "{left}: {x}\n\n{right}: {y}", "{left}\n{x}\n\n{right}\n{y}",
            "{x} - {y}", "{x}\n{y}", '{left} "{x}", {right} "{y}"', "{x} ({left})\n{y} ({right})",
        ))
        gap = self._rng.choice(("\n", "\n\n"))
        return gap.join(line.format(left=left, right=right, x=x, y=y) for x, y in pairs)

    def _registers(self) -> str:
        """같은 말의 두 꼴을 나란히 적는다."""
        rng = self._rng
        one, other = rng.choices(((CASUAL, POLITE), (POLITE, CASUAL), (CASUAL, WRITTEN), (WRITTEN, POLITE)),
                                 (60, 10, 20, 10))[0]
        names = rng.choice(REGISTERS)
        pairs = []
        for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
            said = self._sentence()
            forms = (said.casual, said.polite, said.written)
            pairs.append((forms[one], forms[other]))
        return self._side_by_side(pairs, (names[one], names[other]))

    def _retold(self) -> str:
        """한 사람이 같은 말을 듣는 사람에 따라 달리 한다."""
        rng, said = self._rng, self._sentence()
        name, close, elder = rng.choice(NAMES), rng.choice(WORDS["가까운 사람"]), rng.choice(WORDS["어른"])
        topic = attach(name, "은/는")
        how = rng.choice(("", "", "반말로 "))
        kind = rng.random()
        if kind < 0.15:
            return f'"{said.casual}" 이 말을 존댓말로 바꾸면 "{said.polite}"이다.'
        if kind < 0.3:
            return f"{said.casual} {topic} {close}에게 이렇게 말했다. {elder}께는 다르게 말했다. {said.polite}"
        if kind < 0.4:
            return f"{said.polite} 이 말을 반말로 하면 이렇다. {said.casual}"
        first = f'{topic} {close}에게 {how}"{said.casual}"라고 말했다.'
        second = rng.choice((
            f'{elder}께는 존댓말로 "{said.polite}"라고 말했다.',
            f'{elder} 앞에서는 "{said.polite}"라고 했다.',
            f'{elder}께 같은 말을 할 때는 "{said.polite}"라고 한다.',
        ))
        if rng.random() < 0.8:
            return f"{first} {second}"
        return f'{topic} {second} {close}에게는 "{said.casual}"라고 했다.'

    def _dictation(self) -> str:
        """불러 준 낱말을 그대로 받아쓴다."""
        rng = self._rng
        words = " ".join(rng.choice(WORDS[rng.choice(DICTATED)]) for _ in range(rng.randint(3, 12)))
        read, wrote = rng.choice(DICTATIONS)
        return f"{read} {words}\n{wrote} {words}"

    def _repeated(self) -> str:
        """들은 말을 그대로 따라 한다."""
        said = self._sentence()
        words = self._rng.choice((said.casual, said.polite, said.written))
        elder = attach(self._rng.choice(WORDS["어른"]), "이/가")
        return f'{elder} "{words}"라고 말했다. 모두 "{words}"라고 따라 말했다.'

    def _diary(self) -> str:
        return " ".join(self._sentence().written for _ in range(self._rng.randint(1, 4)))

    def _letter(self) -> str:
        elders = WORDS["어른"]
        sentences = " ".join(self._sentence().polite for _ in range(self._rng.randint(1, 3)))
        return f"{self._rng.choice(elders)}께. {sentences}" if self._rng.random() < 0.5 else sentences

    def _talk(self) -> str:
        one, other = self._rng.sample(NAMES, 2)
        lines = [f"{who}: {self._sentence().casual}" for who in (one, other) * self._rng.randint(1, 2)]
        return "\n".join(lines)

    def _ledger(self) -> str:
        """숫자로 적은 것과 읽은 것을 나란히 적는다."""
        rng = self._rng
        pairs = [self._number_pair() for _ in range(rng.randint(1, 4))]
        if rng.random() < 0.35:
            unit = rng.choice(("원", "원", *WORDS["단위"]))
            pairs = [(f"{written}{unit}", f"{spoken} {unit}") for written, spoken in pairs]
        return self._side_by_side(pairs, rng.choice(SPELLED))

    def _number(self) -> str:
        rng = self._rng
        unit = rng.choice(WORDS["단위"])
        written, spoken = self._number_pair()
        kind = rng.random()
        if kind < 0.25:
            quoted = attach(unit, "이라고/라고")
            return f"장부에 {written}{quoted} 적혀 있다. 소리 내어 읽으면 {spoken} {unit}이다."
        if kind < 0.5:
            return f"{written}{josa(spoken, '은/는')} {attach(spoken, '이라고/라고')} 읽는다."
        if kind < 0.75:
            return f"숫자 {written}{josa(spoken, '을/를')} 한글로 적으면 {attach(spoken, '이다/다')}."
        return f"모두 {written}{unit}이다. 말로 하면 {spoken} {unit}, 숫자로 쓰면 {written}{unit}이다."

    def _when(self) -> str:
        """시각과 날짜."""
        rng = self._rng
        if rng.random() < 0.6:
            return self._side_by_side([self._when_pair() for _ in range(rng.randint(1, 3))], rng.choice(SPELLED))
        written, spoken = self._when_pair()
        return rng.choice((
            f'약속은 {written}이다. 달력을 보고 "{spoken}이야."라고 말했다.',
            f"{written}에 만났다. 곧 {spoken}에 만났다. {self._sentence().written}",
            f"{written}, 읽으면 {spoken}이다.",
        ))

    def _noun(self) -> str:
        """낱말에 조사를 붙여 본다."""
        rng = self._rng
        noun = rng.choice(self._nouns)
        pairs = rng.sample(JOSA, len(JOSA))
        pair, particled = pairs[0], attach(noun, pairs[0])
        return rng.choice((
            f"{noun}: " + ", ".join(attach(noun, pair) for pair in pairs),
            f"{noun} 뒤에 {pair} 가운데 하나를 붙이면 {particled}.",
            f"{pair} 가운데 알맞은 것을 붙인 말: {noun}, {particled}",
            f"{noun}({pair})\n{particled}",
            f"{noun}({pair}): {particled}",
        ))

    def _meaning(self) -> str:
        chosen = self._rng.sample(self._words, self._rng.randint(1, 3))
        ending = self._rng.choice(("이다.", "입니다."))
        return " ".join(f"{attach(word, '은/는')} {meaning}{ending}" for word, meaning in chosen)

    def _lookup(self) -> str:
        """낱말을 말하고 나서 그 뜻을 적는다."""
        rng = self._rng
        word, meaning = rng.choice(self._words)
        name, elder = rng.choice(NAMES), rng.choice(WORDS["어른"])
        sentence = f"{attach(word, '은/는')} {meaning}{rng.choice(('이다.', '입니다.', '입니다.'))}"
        return rng.choice((
            f"{attach(name, '이/가')} 사전에서 {attach(word, '을/를')} 찾았다. {sentence}",
            f"오늘 배운 낱말은 {attach(word, '이다/다')}. {sentence}",
            f'{name}: {attach(word, "을/를")} 알고 싶어.\n{elder}: {sentence}',
            f"{self._sentence().casual} {attach(word, '이/가')} 보인다.\n\n{sentence}",
            f"낱말: {word}\n\n풀이: {sentence}",
            f"{word}\n{sentence}",
            f"{attach(word, '이/가')} 나오는 이야기: {sentence}",
        ))
