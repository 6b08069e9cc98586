"""From the text of an answer to its parts: reasoning, content and tool calls, as they come.

Read deltas.py first, then json_text.py, then the parser of one family. A parser is fed with text in pieces of any
size; the whole answer is the fold of what it says, whatever the pieces were.
"""
