"""페이지를 누구에게 여는가: 다른 사람이 들어올 수 있는 설정인지. torch를 부르지 않아 모델을 올리기 전에 답한다."""

import socket

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def is_loopback(server_name: str) -> bool:
    """이 컴퓨터 안에서만 닿는 주소인가."""
    return server_name.strip("[]").lower() in LOOPBACK or server_name.startswith("127.")


def exposure_problem(server_name: str, share: bool, auth: str | None) -> str:
    """이 설정으로 열면 안 되는 이유. 열어도 되면 빈 글이다."""
    user, colon, password = (auth or "").partition(":")
    if auth and not (user and colon and password):
        return "--auth는 사용자:암호 꼴로 적는다"
    if not auth and (share or not is_loopback(server_name)):
        where = "--share_gradio True" if share else f"--server_name {server_name}"
        return f"다른 사람도 들어올 수 있는 설정이다({where}). --auth 사용자:암호를 함께 적는다"
    return ""


def address_problem(server_name: str) -> str:
    """이 컴퓨터에서 열 수 없는 주소면 그 이유. 열 수 있으면 빈 글이다."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in server_name else socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.bind((server_name, 0))  # 0은 아무 빈 포트다
    except (OSError, UnicodeError):
        return f"--server_name이 이 컴퓨터의 주소가 아니다: {server_name}. 127.0.0.1이나 0.0.0.0을 적는다"
    return ""
