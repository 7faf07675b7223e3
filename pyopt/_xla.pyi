from typing import Any

step_handler: Any

def option_names(rule: str) -> list[str]: ...
