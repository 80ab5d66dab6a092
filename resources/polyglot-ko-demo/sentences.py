"""날마다 쓰는 한국어 문장을 짓는다. 문장 하나는 반말, 존댓말, 글말의 세 꼴을 함께 지닌다."""

import random
from dataclasses import dataclass
from pathlib import Path

from korean import Predicate, attach

LEXICON = Path(__file__).resolve().parent / "lexicon.txt"
OPEN_STEMS = ("보", "찾", "그리", "좋아하", "기억하", "구경하")  # 어떤 명사와도 어울리는 동사


@dataclass(frozen=True)
class Sentence:
    """한 문장의 세 꼴.

    Attributes:
        casual: 반말. "나는 밥을 먹었어."
        polite: 존댓말(하십시오체). "저는 밥을 먹었습니다."
        written: 글말(한다체). "나는 밥을 먹었다."
    """

    casual: str
    polite: str
    written: str


def read_lexicon() -> dict[str, list[str]]:
    """낱말의 갈래 -> 그 줄들. 갈래는 "[이름]" 줄로 시작한다."""
    sections = {}
    for line in LEXICON.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            lines = sections[line.strip("[]")] = []
        elif line:
            lines.append(line)
    return sections


def _predicates(lines: list[str], adjective: bool = False) -> list[tuple[Predicate, list[str]]]:
    """"어간 어-꼴 을-어간 명사..." 줄들. 을-어간이 "-"면 어간과 같다. 명사는 목적어나 주어가 된다."""
    rows = []
    for line in lines:
        stem, infinitive, before_eu, *nouns = line.split()
        rows.append((Predicate(stem, infinitive, stem if before_eu == "-" else before_eu, adjective), nouns))
    return rows


LINES = read_lexicon()
WORDS = {name: " ".join(lines).split() for name, lines in LINES.items()}
TRANSITIVES, INTRANSITIVES = _predicates(LINES["동사와 목적어"]), _predicates(LINES["목적어가 없는 동사"])
MOTIONS, ADJECTIVES = _predicates(LINES["오가는 동사"]), _predicates(LINES["형용사와 주어"], adjective=True)
OPEN = [predicate for predicate, _ in TRANSITIVES if predicate.stem in OPEN_STEMS]
NAMES, PEOPLE, PLACES, ROLES = (WORDS[name] for name in ("이름", "사람", "곳", "하는 일"))


class Writer:
    """문장을 하나씩 짓는다. 난수의 시드가 같으면 같은 문장들이다."""

    def __init__(self, rng: random.Random):
        self._rng = rng

    def sentence(self) -> Sentence:
        kind = self._rng.random()
        if kind < 0.72:
            return self._action()
        if kind < 0.88:
            return self._description()
        return self._identity()

    def _some(self, options: list[str], chance: float) -> list[str]:
        return [self._rng.choice(options)] if self._rng.random() < chance else []

    def _subject(self) -> tuple[str, str]:
        """주어의 (반말과 글말, 존댓말). 둘은 말하는 사람이 "나"일 때만 다르다."""
        kind = self._rng.random()
        if kind < 0.5:
            return self._rng.choice((("나는", "저는"), ("나는", "저는"), ("나도", "저도"), ("내가", "제가")))
        if kind < 0.58:
            return ("우리는", "우리는")
        if kind < 0.66:
            who = attach(self._rng.choice(PEOPLE), self._rng.choice(("은/는", "이/가")))
            return (f"내 {who}", f"제 {who}")
        who = attach(self._rng.choice(NAMES + PEOPLE), self._rng.choice(("은/는", "이/가", "도/도")))
        return (who, who)

    def _object(self) -> tuple[Predicate, list[str]]:
        if self._rng.random() < 0.3:
            return self._rng.choice(OPEN), [attach(self._rng.choice(WORDS["명사"]), "을/를")]
        predicate, nouns = self._rng.choice(TRANSITIVES)
        return predicate, [*self._some(WORDS["어떤"], 0.2), attach(self._rng.choice(nouns), "을/를")]

    def _action(self) -> Sentence:
        rng, kind = self._rng, self._rng.random()
        if kind < 0.7:
            predicate, middle = self._object()
            middle = self._some([f"{place}에서" for place in PLACES], 0.35) + middle
        elif kind < 0.85:
            predicate, _ = rng.choice(INTRANSITIVES)
            middle = self._some([f"{place}에서" for place in PLACES], 0.7)
        else:
            predicate, _ = rng.choice(MOTIONS)
            middle = [f"{rng.choice(PLACES)}에"]
        if rng.random() < 0.15:
            middle.insert(0, attach(rng.choice(NAMES + PEOPLE), "과/와"))
        middle += self._some(WORDS["어떻게"], 0.15)
        mine, humble = self._subject()
        tense, (casual, polite, written) = self._ending(predicate, first_person=mine[0] in "나내우" and " " not in mine)
        times = {"past": WORDS["지난 때"], "future": WORDS["앞으로 올 때"]}.get(tense, [])
        when = self._some(times, 0.45) if times else []
        if tense == "request":
            return _join([*when, *middle], [*when, *middle], casual, polite, written)
        if rng.random() < 0.15:
            return _join([*when, mine, *middle], [*when, humble, *middle], casual, polite, written)
        return _join([mine, *when, *middle], [humble, *when, *middle], casual, polite, written)

    def _ending(self, p: Predicate, first_person: bool) -> tuple[str, tuple[str, str, str]]:
        """(때, (반말, 존댓말, 글말)) 끝의 꼴 하나. 다짐은 말하는 사람만, 물음은 남에 대해서만 한다."""
        endings = (
            (8, "past", (f"{p.past}어.", f"{p.past}습니다.", f"{p.past}다.")),
            (4, "now", (f"{p.infinitive}.", f"{p.formal}.", f"{p.plain}.")),
            (4, "future", (f"{p.future} 거야.", f"{p.future} 겁니다.", f"{p.future} 것이다.")),
            (3 * first_person, "future", (f"{p.future}게.", f"{p.stem}겠습니다.", f"{p.stem}겠다.")),
            (3, "now", (f"{p.stem}고 싶어.", f"{p.stem}고 싶습니다.", f"{p.stem}고 싶다.")),
            (3, "now", (f"{p.stem}고 있어.", f"{p.stem}고 있습니다.", f"{p.stem}고 있다.")),
            (2, "now", (f"{p.future} 수 있어.", f"{p.future} 수 있습니다.", f"{p.future} 수 있다.")),
            (2, "now", (f"{p.infinitive}야 해.", f"{p.infinitive}야 합니다.", f"{p.infinitive}야 한다.")),
            (2, "past", (f"{p.stem}지 않았어.", f"{p.stem}지 않았습니다.", f"{p.stem}지 않았다.")),
            (4 * (not first_person), "past", (f"{p.past}어?", f"{p.past}습니까?", f"{p.past}는가?")),
            (3 * (not first_person), "future", (f"{p.future} 거야?", f"{p.future} 겁니까?", f"{p.future} 것인가?")),
            (2, "request", (f"{p.infinitive} 줘.", f"{p.infinitive} 주세요.", f"{p.infinitive} 달라.")),
            (2, "request", (f"{p.stem}자.", f"{p.together}.", f"{p.stem}자.")),
        )
        _, tense, forms = self._rng.choices(endings, [weight for weight, _, _ in endings])[0]
        return tense, forms

    def _description(self) -> Sentence:
        rng = self._rng
        predicate, nouns = rng.choice(ADJECTIVES)
        owner = rng.choice((("", ""), ("", ""), ("내", "제"), ("우리", "우리"), ("이", "이"), ("그", "그")))
        noun = attach(rng.choice(nouns), rng.choice(("은/는", "이/가")))
        degree = self._some(WORDS["얼마나"], 0.5)
        forms = rng.choice((
            (f"{predicate.infinitive}.", f"{predicate.formal}.", f"{predicate.plain}."),
            (f"{predicate.past}어.", f"{predicate.past}습니다.", f"{predicate.past}다."),
            (f"{predicate.stem}지 않아.", f"{predicate.stem}지 않습니다.", f"{predicate.stem}지 않다."),
            (f"{predicate.future} 거야.", f"{predicate.future} 겁니다.", f"{predicate.future} 것이다."),
        ))
        place = self._some(["오늘", "요즘", "여기", "올해"], 0.3)
        mine, humble = ([word] if word else [] for word in owner)
        return _join([*place, *mine, noun, *degree], [*place, *humble, noun, *degree], *forms)

    def _identity(self) -> Sentence:
        rng = self._rng
        mine, humble = self._subject()
        role = rng.choice(ROLES)
        if rng.random() < 0.2:
            role = attach(role, "이/가")
            return _join([mine, role], [humble, role], "아니야.", "아닙니다.", "아니다.")
        forms = rng.choice((
            (attach(role, "이/") + "야.", role + "입니다.", role + "이다."),
            tuple(attach(role, pair) + "." for pair in ("이었어/였어", "이었습니다/였습니다", "이었다/였다")),
        ))
        return _join([mine], [humble], *forms)


def _join(casual: list[str], polite: list[str], *endings: str) -> Sentence:
    bare = (casual, polite, casual)
    return Sentence(*(" ".join([*words, ending]) for words, ending in zip(bare, endings, strict=True)))
