"""페이지에 손님 여럿이 한꺼번에 묻고, 그 가운데 셋의 하나는 답을 다 보지 않고 떠난다. 마지막 줄은 JSON이다.

    python tests/bench/load_page.py --peft_root train/lora-demo --clients 20 --seconds 60
"""

import argparse
import collections
import json
import random
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from serving import SETTINGS, Served, Visitor, event_number, resident_bytes, serving

TOKENS = 60
DONE = ("스스로 멈춤", "최대 길이에 닿음")


def load(served: Served, clients: int, seconds: float, seed: int = 0) -> dict:
    """손님들을 들여보내고 무엇을 보았는지 센다. lost는 기다렸는데 끝나지 않은 답이다."""
    number = event_number(served.url, "submit")
    settings = [*SETTINGS[:3], TOKENS, *SETTINGS[4:]]
    Visitor(served.url, number).ask("몸풀기", settings=settings)
    before = resident_bytes(served.process)
    seen: collections.Counter = collections.Counter()
    counting = threading.Lock()
    until = time.monotonic() + seconds

    def visit(client: int) -> None:
        chance = random.Random(seed * 1000 + client)
        while time.monotonic() < until:
            leave = chance.uniform(0.05, 2) if chance.random() < 1 / 3 else None
            try:
                shown = Visitor(served.url, number).ask(f"{client}번 손님의 질문", settings=settings, leave_after=leave)
                result = _kind(shown)
            except Exception as error:
                result = f"lost: {type(error).__name__}"
            with counting:
                seen[result] += 1
            if result == "busy":
                time.sleep(chance.uniform(0.2, 1))

    threads = [threading.Thread(target=visit, args=(client,)) for client in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    began = time.monotonic()
    after = Visitor(served.url, number).ask("모두 떠난 뒤의 질문", settings=settings)
    grown = resident_bytes(served.process) - before
    return {"clients": clients, "seconds": seconds, "answered": seen["answered"], "left": seen["left"],
            "busy": seen["busy"], "lost": sum(count for kind, count in seen.items() if kind.startswith("lost")),
            "kinds": dict(seen), "ram_grown_mb": round(grown / 1e6, 1), "next_answer": _kind(after),
            "next_answer_seconds": round(time.monotonic() - began, 2)}


def _kind(shown: list | None) -> str:
    if shown is None:
        return "left"
    if "바빠요" in shown[1]:
        return "busy"
    return "answered" if shown[0] and any(reason in shown[1] for reason in DONE) else f"lost: {shown[1][:60]}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peft_root", required=True)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    with serving("--peft_root", options.peft_root) as page:
        print(json.dumps(load(page, options.clients, options.seconds), ensure_ascii=False))
