"""An evaluation as it is filed: what was compared, by what, on what, with what verdict; for reviewers and auditors.

columns.py  the columns of an evaluation's tables, told once for the terminal and the page
page.py     the record as one page
record.py   the record: date, versions, options, machine, seals and hashes, every slice, every verdict
"""
