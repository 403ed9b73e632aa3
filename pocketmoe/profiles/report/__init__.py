"""Profiles as pages and tables.

charts.py           its pictures, as SVG
columns.py          the columns of a report, told once, as text and as markup
elsewhere.py        other machines, predicted: one picture and one table
headline.py         speed, knee, and what memory that is saved costs
html.py             markup that nothing hostile gets through; the page around it (`profiles/page.css`)
page.py             a profile as one HTML page
profile_columns.py  those of a profile's runs and predictions
routing.py          the part of it that shows the routing
storage.py          the part of it that shows how experts are stored
tables.py           a profile and predictions as text
"""
