"""Mixed precision: what each format costs each matrix, and the best choice within a budget.

allocate.py     the knapsack: formats of least loss within budgets
choose.py       mixed precision: candidates, costs, the plan
sensitivity.py  what each format would cost each matrix of each expert, measured
"""
