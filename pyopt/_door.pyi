from typing import Any

c_api_v1: Any

def get_include() -> str: ...
