"""The experiments of arXiv 2506.03719 on the user's own images: one command, one JSON, one picture each.

    nnflow figures NAME --index OUT --out DIR     DIR/NAME.json, then DIR/NAME.png and .pdf drawn from it

`experiment` says what an experiment is and runs it, `inputs` opens what it is about, `parts` keeps what is
measured, so that a killed command goes on. A module measures, its twin in `drawn` draws; `registry` lists
them.
"""
