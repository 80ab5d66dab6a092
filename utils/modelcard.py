"""합친 모델 폴더의 README.md(모델 카드)를 만든다."""

from pathlib import Path

_CARD = """---
base_model: {base}
language: ko
library_name: transformers
pipeline_tag: text-generation
tags: [lora, merged]
---
# {name}

`{base}`에 LoRA 어댑터를 합친 모델이다. 허가서와 알려진 한계는 기반 모델의 것을 따른다.

| 항목 | 값 |
|---|---|
| 구조 | {kind} |
| rank, alpha | {rank}, {alpha} |
| 배운 층 | {targets} |
| 합친 바탕 | {onto} |

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

- 끝 토큰은 토크나이저의 것이 맨 앞이고, 기반 모델의 설정이 말하는 다른 끝이 뒤따른다. 설정 파일에도 그렇게 적혀 있다.
- `prompt.json`에 학습에 쓴 템플릿이 있다. 다른 형식으로 물으면 답이 나빠진다.
- `adapter/`는 4비트로 띄울 때 쓴다. 합친 가중치를 그대로 4비트로 줄이면 배운 것의 일부가 반올림에 묻힌다.
  `python generate.py --load_4bit True --base_model {name}`은 어댑터를 뺀 가중치를 4비트로 올리고 어댑터를 얹는다.
- `merge-report.json`은 합친 뒤 다시 읽어 견준 결과이고, `manifest.json`은 파일마다의 크기와 sha256이다.
"""
_ONTO = {"original": "기반 모델의 원래 가중치", "quantized": "NF4를 다녀온 가중치"}


def render(job, output: Path) -> str:
    """`job`(merger.Job)을 합친 폴더의 모델 카드."""
    targets = sorted({name.removesuffix(".weight").rsplit(".", 1)[-1] for name in job.updates})
    base = str(job.config.get("base_model_name_or_path") or job.base.path.name).replace("\\", "/").rstrip("/")
    name = output.name
    return _CARD.format(base=base.rsplit("/", 1)[-1] if Path(base).exists() else base, name=name,
                        kind=job.base.config["model_type"], rank=job.config["r"], alpha=job.config["lora_alpha"],
                        targets=", ".join(targets), onto=_ONTO[job.onto])
