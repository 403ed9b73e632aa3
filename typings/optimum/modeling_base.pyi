from typing import Any

class OptimizedModel:
    model: Any
    config: Any
    def __init__(self, model: Any, config: Any, preprocessors: list[Any] | None = None) -> None: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
