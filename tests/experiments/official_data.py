"""A few records of each official data set, in files of the distributed names and formats."""

import gzip
import json
import sqlite3

GLUE = {
    "CoLA": {
        "train": ['gj04\t1\t\tHe said "hello.', "gj04\t0\t*\tThey drank the pub."],
        "dev": ["gj04\t1\t\tThe sailors rode the breeze clear of the rocks."],
        "test": ["index\tsentence", "0\tBill whistled past the house."],
    },
    "SST-2": {
        "train": ["sentence\tlabel", "hide new secretions from the parental units \t0", '" wit \t1'],
        "dev": ["sentence\tlabel", "it 's a charming journey . \t1"],
        "test": ["index\tsentence", "0\tuneasy mishmash of styles ."],
    },
    "MRPC": {
        "train": [
            "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
            '1\t702876\t702977\tAmrozi accused his brother , whom he called " the witness " .\tHe accused " the',
        ],
        "dev": ["\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", "0\t1\t2\tHe said so .\tShe did not ."],
        "test": ["index\t#1 ID\t#2 ID\t#1 String\t#2 String", "0\t3\t4\tPCCW 's chief\tCurrent chief"],
    },
    "STS-B": {
        "train": [
            "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
            "0\tmain-captions\tMSRvid\t2012test\t0001\tnone\tnone\tA plane takes off.\tAn air plane takes off.\t5.000",
            "1\tmain-captions\tMSRvid\t2012test\t0004\tnone\tnone\tA man plays a flute.\tA man plays.\t3.800",
        ],
        "dev": [
            "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
            "0\tmain-captions\tMSRvid\t2012test\t0000\tnone\tnone\tA man wears a hat.\tA man has a hat.\t0.000",
        ],
        "test": [
            "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2",
            "0\tmain-captions\tMSRvid\t2012test\t0024\tnone\tnone\tA girl styles hair.\tA girl brushes hair.",
        ],
    },
    "QQP": {
        "train": [
            "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
            "133273\t213221\t213222\tHow is life?\tWhat is life like?\t1",
        ],
        "dev": ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t2\t3\tWhy?\tHow?\t0"],
        "test": ["id\tquestion1\tquestion2", "0\tWould it help?\tDoes it help?"],
    },
    "MNLI": {
        "train": [
            "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
            "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
            "0\t31193\t31n\tgovernment\t( a )\t( b )\t(A a)\t(B b)\tIt has two sides.\tIt is good.\tneutral\tneutral",
        ],
        **{
            f"dev_{kind}": [
                "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
                "sentence2_parse\tsentence1\tsentence2\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5\tgold_label",
                f"0\t63735\t63735n\tslate\t( a )\t( b )\t(A a)\t(B b)\t{kind}\tb\tneutral\tneutral\tneutral\tentailment"
                "\tneutral\tcontradiction",
            ]
            for kind in ("matched", "mismatched")
        },
        **{
            f"test_{kind}": [
                "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
                "sentence2_parse\tsentence1\tsentence2",
                f"0\t31493\t31493\ttravel\t( a )\t( b )\t(A a)\t(B b)\t{kind}\tb",
            ]
            for kind in ("matched", "mismatched")
        },
    },
    "QNLI": {
        "train": ["index\tquestion\tsentence\tlabel", "0\tWhen did it begin?\tIt began in 1970.\tentailment"],
        "dev": ["index\tquestion\tsentence\tlabel", "0\tWhat came?\tNothing did.\tnot_entailment"],
        "test": ["index\tquestion\tsentence", "0\tWhat organization?\tThe one."],
    },
    "RTE": {
        "train": [
            "index\tsentence1\tsentence2\tlabel",
            "0\tNo weapons were found.\tWeapons were found.\tnot_entailment",
            '1\tHe and "she met.\tThey met.\tentailment',
        ],
        "dev": [
            "index\tsentence1\tsentence2\tlabel",
            "0\tDana Reeve died.\tShe is dead.\tentailment",
            "1\tIt rained.\tIt was dry.\tnot_entailment",
        ],
        "test": ["index\tsentence1\tsentence2", "0\tMangla was summoned.\tShe was asked."],
    },
    "WNLI": {
        "train": [
            "index\tsentence1\tsentence2\tlabel",
            "0\tI stuck a pin through a carrot.\tThe carrot had a hole.\t1",
        ],
        "dev": ["index\tsentence1\tsentence2\tlabel", "0\tThe drain is clogged.\tHair has to be cleaned.\t0"],
        "test": ["index\tsentence1\tsentence2", "0\tMaude and Dora saw trains.\tThe trains were going."],
    },
}

ALPACA = [
    {"instruction": "Give three tips.", "input": "", "output": "1. Eat."},
    {"instruction": "Name the odd one out.", "input": "Twitter, Instagram, Telegram", "output": "Telegram"},
    {"instruction": "Generate a poem.", "input": "", "output": ""},
]
SAMSUM = {
    "id": "13818513",
    "summary": "Amanda baked cookies and will bring Jerry some tomorrow.",
    "dialogue": "Amanda: I baked  cookies. Do you want some?\r\nJerry: Sure!",
}
MESSAGE_KEYS = {"lang": "en", "deleted": False, "synthetic": False, "tree_state": "ready_for_export"}
OASST_TREE = {
    "message_tree_id": "q",
    "tree_state": "ready_for_export",
    "prompt": {
        "message_id": "q",
        "parent_id": None,
        "text": "Why can't we divide by 0?",
        "role": "prompter",
        **MESSAGE_KEYS,
        "replies": [
            {"message_id": "a1", "parent_id": "q", "text": "worse", "role": "assistant", "rank": 1, "replies": []},
            {
                "message_id": "a0",
                "parent_id": "q",
                "text": "best",
                "role": "assistant",
                "rank": 0,
                "replies": [
                    {
                        "message_id": "q2",
                        "parent_id": "a0",
                        "text": "And i?",
                        "role": "prompter",
                        "replies": [
                            {
                                "message_id": "d",
                                "parent_id": "q2",
                                "text": "deleted",
                                "role": "assistant",
                                "rank": 0,
                                "deleted": True,
                                "replies": [],
                            },
                            {
                                "message_id": "a2",
                                "parent_id": "q2",
                                "text": "imaginary",
                                "role": "assistant",
                                "rank": None,
                                "replies": [
                                    {
                                        "message_id": "q3",
                                        "parent_id": "a2",
                                        "text": "Thanks",
                                        "role": "prompter",
                                        "replies": [],
                                    }
                                ],
                            },
                        ],
                    }
                ],
            },
        ],
    },
}
UNANSWERED_TREE = {
    "message_tree_id": "z",
    "prompt": {"message_id": "z", "parent_id": None, "text": "Hello?", "role": "prompter", "replies": []},
}
SQUAD_CONTEXT = "Architecturally, the school has a Catholic character. Atop the dome is a statue."


def flatten(message):
    """The messages of a tree, each with its replies removed, as in the flat export."""
    replies = message.get("replies", [])
    return [{key: value for key, value in message.items() if key != "replies"}] + [
        row for reply in replies for row in flatten(reply)
    ]


def squad(version):
    qas = [
        {
            "answers": [{"answer_start": 32, "text": "Catholic"}, {"answer_start": 30, "text": "a Catholic character"}],
            "question": "What character does it have?",
            "id": "5733",
        },
        {"answers": [{"answer_start": 65, "text": "a statue"}], "question": "What is atop?", "id": "5734"},
    ]
    if version == "v2.0":
        for row in qas:
            row["is_impossible"] = False
        plausible = [{"text": "dome", "answer_start": 59}]
        qas.append(
            {"plausible_answers": plausible, "question": "Who?", "id": "5a", "answers": [], "is_impossible": True}
        )
    article = {"title": "Notre_Dame", "paragraphs": [{"context": SQUAD_CONTEXT, "qas": qas}]}
    return {"data": [article, {**article, "title": "Again"}], "version": version}


def write_lines(path, lines, end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line + end for line in lines).encode())
    return path


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def write_rows(path, rows):
    return write_lines(path, [json.dumps(row) for row in rows])


def write_glue(root):
    for folder, splits in GLUE.items():
        for split, lines in splits.items():
            write_lines(root / folder / f"{split}.tsv", lines)
    return root


def write_squad(root, version="v1.1"):
    for split in ("train", "dev"):
        write_json(root / f"{split}-{version}.json", squad(version))
    return root


def write_e2e(root):
    rows = [
        '"name[Alimentum], area[city centre]","There is a place, Alimentum, ""here""."',
        '"name[Alimentum], area[city centre]",Alimentum is here.',
        '"name[Cotto], eatType[coffee shop]",Cotto is a coffee shop.',
    ]
    for name in ("trainset.csv", "devset.csv", "testset_w_refs.csv"):
        write_lines(root / name, ["mr,ref", *rows], end="\r\n")
    write_lines(root / "testset.csv", ["MR", '"name[Alimentum], area[city centre]"'])
    return root


def write_oasst(root, *trees):
    root.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(tree) + "\n" for tree in trees)
    (root / "2023-04-12_oasst_ready.trees.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return root


def write_wikisql(root):
    header = ["Player", "Team", "Points", "team"]
    rows = [["John", "Hawks", 12, "x"], ["Mary", "Bulls", 3.5, "y"]]
    table = {"id": "1-1000-1", "header": header, "types": ["text", "text", "real", "text"], "rows": rows}
    conditions = [[0, 0, "John"], [2, 1, "1,000.5"]]
    questions = [
        {
            "phase": 1,
            "table_id": "1-1000-1",
            "question": "Who?",
            "sql": {"sel": 1, "agg": 0, "conds": [[0, 0, "John"]]},
        },
        {"phase": 1, "table_id": "1-1000-1", "question": "Best?", "sql": {"sel": 2, "agg": 1, "conds": []}},
        {"phase": 2, "table_id": "1-1000-1", "question": "Both?", "sql": {"sel": 3, "agg": 3, "conds": conditions}},
    ]
    for split in ("train", "dev", "test"):
        write_rows(root / f"{split}.jsonl", questions)
        write_rows(root / f"{split}.tables.jsonl", [table])
        database = sqlite3.connect(root / f"{split}.db")
        database.execute("CREATE TABLE table_1_1000_1 (col0 text, col1 text, col2 real, col3 text)")
        values = [[cell.lower() if isinstance(cell, str) else cell for cell in row] for row in rows]
        database.executemany("INSERT INTO table_1_1000_1 VALUES (?, ?, ?, ?)", values)
        database.commit()
        database.close()
    return root


def choice(task, label):
    words = {"boolq": "true/false", "piqa": "solution1/solution2", "hellaswag": "ending1/ending2/ending3/ending4"}
    question = f"Please choose: …\n\nAnswer format: {words.get(task, 'answer1/answer2')}"
    return {"instruction": question, "input": "", "output": f"the correct answer is {label}", "answer": label}
