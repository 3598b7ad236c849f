"""What help(kvfold.Cache) says first is what a user calls, all of it."""

import re

import kvfold


def test_help_begins_with_what_a_user_calls():
    text = kvfold.Cache.__doc__ or ""
    shown = set(re.findall(r"`(\w+)(?:\(\w*\))?`", text[text.index("To use") : text.index("What else")])) - {"generate"}
    assert all(hasattr(kvfold.Cache, name) for name in shown), shown
    own = {name for name in vars(kvfold.Cache) if not name.startswith("_")}
    assert own <= shown and {"join", "retire", "row_nbytes", "undecided", "method"} <= shown, own - shown
