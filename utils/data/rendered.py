"""문서를 사람이 읽는 글로: 어디를 배우는지가 보인다."""

from itertools import pairwise

import numpy as np


def rendered_lines(documents, tokenizer, train_on_inputs: bool, n: int = 2) -> list[str]:
    """문서 몇 개를 배우는 곳이 보이게 적는다. ⟦ ⟧ 안의 글만 loss에 든다(첫 토큰은 언제나 빠진다)."""
    lines = []
    for index in range(min(n, len(documents))):
        tokens, answer = documents.document(index)
        learnt = answer.copy() if documents.pairs or not train_on_inputs else ~documents.muted(index)
        side = ("고른 답, ", "버린 답, ")[index % 2] if documents.pairs else ""
        learnt[0] = False
        edges = [0, *(np.flatnonzero(np.diff(learnt)) + 1), len(tokens)]
        parts = [(tokenizer.decode(tokens[start:end], skip_special_tokens=False), learnt[start])
                 for start, end in pairwise(edges)]
        text = "".join(f"⟦{part}⟧" if kept else part for part, kept in parts)
        lines += [f"{documents.numbers[index]}번째 행({side}{len(tokens)} 토큰, 배우는 토큰 {int(learnt.sum())}):",
                  *(f"  {line}" for line in text.splitlines())]
    return lines
