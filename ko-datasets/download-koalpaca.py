"""KoAlpaca v1.1a를 받아(또는 이미 받은 파일을 읽어) textonly 형식으로 바꾼다."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import cli, console
from utils.errors import UsageError

HUB_ID = "beomi/KoAlpaca-v1.1a"
TARGET = Path(__file__).resolve().parent / "KoAlpaca_v1.1a_textonly.json"


def download(*, source: str = HUB_ID, output: str = str(TARGET), cache_dir: str | None = None):
    """KoAlpaca v1.1a를 받아 학습이 읽는 textonly 형식(한 줄에 {"text": ...} 하나)으로 쓴다.

    Args:
        source: hub id, 또는 이미 받은 .jsonl .json .parquet 파일. instruction과 output 열이 있어야 한다.
        output: 쓸 파일. 다 쓴 뒤에야 이 이름으로 나타난다.
        cache_dir: 받은 원본을 둘 폴더.
    """
    from utils.data.columns import require_form
    from utils.data.forms import read_row
    from utils.data.rows import read_rows
    from utils.data.texts import END_TOKEN
    from utils.files import staged_file
    from utils.prompter import Prompter

    target, prompter, form, written, left_out = Path(output), Prompter(), None, 0, 0
    with staged_file(target, "쓰지 못했다") as stream:
        for number, row in read_rows(source, cache_dir):
            form = form or require_form(row, source)
            try:
                pieces = prompter.talk(read_row(row, form, number, source))[0]
            except UsageError:
                left_out += 1
                continue
            text = "".join(prompt + answer + END_TOKEN for prompt, answer in pieces)
            stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            written += 1
        if not written:
            raise UsageError(f"{source}에 쓸 수 있는 행이 하나도 없다")
    console.say(f"{written:,}행을 썼다: {target}" + (f" (글이 빈 {left_out:,}행은 뺐다)" if left_out else ""))


if __name__ == "__main__":
    cli.run(download)
