"""적지 않은 설정을 모델의 구조에 맞게 채운다. 왜 이 값인지는 tests/bench/README.md의 잰 표에 있다."""

from collections.abc import Mapping
from dataclasses import replace

from utils.train.records import Settings

RATES = {"gpt_neox": 1e-3}  # polyglot
OTHER_RATE = 5e-4  # auto가 고르는 층에 맞다


def fill(settings: Settings, config: Mapping) -> Settings:
    """학습률을 적지 않았으면 채운 설정.

    Args:
        config: 기반 모델의 config.json.
    """
    if settings.learning_rate is not None:
        return settings
    return replace(settings, learning_rate=RATES.get(config["model_type"], OTHER_RATE))
