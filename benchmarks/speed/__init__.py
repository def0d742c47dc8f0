"""The project's speed claims, each measured beside what it is claimed against (`budgetvlm bench`).

`figures` says what a result is, `material` on what is measured, every other file measures one claim; `sections` lists
them.
"""
