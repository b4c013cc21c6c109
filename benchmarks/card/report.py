def summary(records):
    import json
    return "\n".join(json.dumps(r)[:400] for r in records)
