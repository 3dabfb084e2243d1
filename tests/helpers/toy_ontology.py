"""A few terms of a made-up ontology."""

ABOVE = {"CL:0000988": 2, "CL:0000000": 3}


TERMS = {
    "CL:0000000": {"label": "cell"},
    "CL:0000988": {"label": "hematopoietic cell", "ancestors": {"CL:0000000": 1}},
    "CL:0000542": {"label": "lymphocyte", "ancestors": {"CL:0000988": 1, "CL:0000000": 2}},
    "CL:0000763": {"label": "myeloid cell", "ancestors": {"CL:0000988": 1, "CL:0000000": 2}},
    "CL:0000084": {
        "label": "T cell",
        "synonyms": ["T-lymphocyte", "mature cell"],
        "ancestors": {"CL:0000542": 1, **ABOVE},
    },
    "CL:0000624": {
        "label": "CD4-positive, alpha-beta T cell",
        "ancestors": {"CL:0000084": 2, "CL:0000542": 3, "CL:0000988": 4, "CL:0000000": 5},
    },
    "CL:0000236": {"label": "B cell", "synonyms": ["mature cell"], "ancestors": {"CL:0000542": 1, **ABOVE}},
    "CL:0000576": {"label": "monocyte", "ancestors": {"CL:0000763": 1, **ABOVE}},
    "CL:0000066": {"label": "epithelial cell", "ancestors": {"CL:0000000": 1}},
    "CL:0000999": {"label": "OBSOLETE monocyte", "deprecated": True, "replaced_by": "CL:0000576"},
    "CL:0000998": {"label": "OBSOLETE thing", "deprecated": True},
    "CL:0000997": {"label": "OBSOLETE older monocyte", "deprecated": True, "replaced_by": "CL:0000999"},
    "CL:0000996": {"label": "OBSOLETE line", "deprecated": True, "replaced_by": "CLO:0000019"},
    "CL:0000995": {"label": "OBSOLETE circle", "deprecated": True, "replaced_by": "CL:0000994"},
    "CL:0000994": {"label": "OBSOLETE other half", "deprecated": True, "replaced_by": "CL:0000995"},
}
