r"""What the checks `math`, `numeric`, `choice` and `exact` know of answers.

    response.py    where in a response its answer stands: after the thoughts, in the last box
    writing.py     one spelling for the many of unicode and LaTeX
    units.py       a number apart from its unit, currency, degrees or percent
    terms.py       expressions as trees, and their values to sixty digits
    tokens.py      text to numerals, words and signs
    expression.py  those to such a tree
    finished.py    whether a number is worked out, or a calculation left as it stands
    values.py      whether two expressions have the same value
    shapes.py      sets, tuples, intervals, lists, matrices and relations around expressions
    reading.py     text to those: one text may have several readings
    ranges.py      intervals, their unions, and the inequalities that say the same
    compare.py     whether two answers are the same

Nothing here evaluates text as a program. What a text may cost is bounded: its length, its depth and
the size of its numbers.
"""
