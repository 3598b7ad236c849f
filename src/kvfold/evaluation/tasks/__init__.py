"""Tasks that are made here, to any length and for any tokenizer, with a seed and no download; and their registry."""

from kvfold.evaluation.tasks.base import Setting, TaskInfo, get_task, list_tasks, make_examples, parse_task, task

__all__ = ["Setting", "TaskInfo", "get_task", "list_tasks", "make_examples", "parse_task", "task"]
