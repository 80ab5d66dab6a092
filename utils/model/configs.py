"""transformers의 `AutoConfig`를 얻는 한곳."""

from functools import cache


@cache
def auto_config():
    """`AutoConfig`. hidden이 머리의 수로 나누어지지 않는 Llama(kanana 2.1B)도 읽게 한 것이다.

    transformers 5.17부터 5.24까지의 `LlamaConfig`는 head_dim이 적혀 있어도 그런 설정을 거절한다. 모델의 층은
    head_dim으로 만들어지므로 계산은 옳다. head_dim이 없어 정말 어긋나는 설정은 `shape.require_shapes`가 가중치의 모양을
    보고 거절한다.
    """
    from transformers import AutoConfig, LlamaConfig

    LlamaConfig.__class_validators__ = [
        check for check in LlamaConfig.__class_validators__ if check.__name__ != "validate_architecture"]
    return AutoConfig
