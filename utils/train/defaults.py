"""적지 않은 설정을 모델의 구조에 맞게 채운다. 왜 이 값인지는 tests/bench/README.md의 잰 표에 있다."""

from collections.abc import Mapping
from dataclasses import replace

from utils.train.records import Settings

RATES = {"gpt_neox": 1e-3}  # polyglot
OTHER_RATE = 5e-4  # auto가 고르는 층에 맞다
PAIR_RATE = 3e-5  # 선호 쌍. 1e-5로는 덜 배우고, 1e-4에서는 데모 모델의 답이 깨졌다
BETA = 0.1  # DPO의 논문과 TRL이 쓰는 값


def fill(settings: Settings, config: Mapping, pairs: bool = False) -> Settings:
    """학습률과, 선호 쌍이면 DPO의 beta를 적지 않았으면 채운 설정.

    Args:
        config: 기반 모델의 config.json.
        pairs: 선호 쌍을 배우는가.
    """
    if settings.learning_rate is None:
        rate = PAIR_RATE if pairs else RATES.get(config["model_type"], OTHER_RATE)
        settings = replace(settings, learning_rate=rate)
    if pairs and settings.dpo_beta is None:
        settings = replace(settings, dpo_beta=BETA)
    return settings
