"""Engines, which serve a worker's requests. `LlmEngine` batches continuously on a GPU server, `QueueEngine` is a textbook queue."""

from __future__ import annotations

from sllm.engine.base import Engine as Engine
from sllm.engine.base import EngineUsage as EngineUsage
from sllm.engine.base import Evicted as Evicted
from sllm.engine.base import Finished as Finished
from sllm.engine.base import FirstTokenOut as FirstTokenOut
from sllm.engine.base import Loaded as Loaded
from sllm.engine.base import ModelTooLarge as ModelTooLarge
from sllm.engine.base import Notification as Notification
from sllm.engine.base import RequestTooLarge as RequestTooLarge
from sllm.engine.base import Started as Started
from sllm.engine.batching import LlmEngine as LlmEngine
from sllm.engine.queue import QueueEngine as QueueEngine

ENGINES: dict[str, type[Engine]] = {"llm": LlmEngine, "queue": QueueEngine}
"""Engines by the name that users choose them with."""
