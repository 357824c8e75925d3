"""What the runs say: verdicts -> statistics -> sentences.

verdicts.py   a run's metrics -> how it ended
outcomes.py   each cell's verdict, from its run directory
matching.py   whether the arms saw the same inputs and started from the same weights
statistics.py intervals, tests, thresholds: pure functions on numbers
results.py    the results as data: what summary.json holds
searches.py   the outcomes of a search for a threshold -> its bracket
measures.py   the runs that arms share -> the value of a contrast
contrasts.py  values -> answers; pairs
stages.py     whether a comparison stops after its first seeds
summary.py    outcomes -> results: arms, searches, contrasts and pairs
outlook.py    how many seeds would settle an open question
wording.py    results -> sentences
headline.py   results -> the first screen of the report
"""
