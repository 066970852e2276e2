"""A little plain conversation, so that a model trained on tasks can also be greeted: who it is, what it can do, and
short answers on Python terms. Not verified and not part of any figure; the table below was written for this file."""

from __future__ import annotations

import random
from typing import Any

TERMS = {
    "list": "A list is an ordered collection that can grow and change, written [1, 2, 3].",
    "tuple": "A tuple is an ordered collection that cannot change, written (1, 2).",
    "dict": "A dict maps keys to values, written {'a': 1}.",
    "set": "A set holds each value at most once, written {1, 2}.",
    "string": "A string is a sequence of characters, written 'text'.",
    "int": "An int is a whole number of any size.",
    "float": "A float is a number with a fractional part, stored in 64 bits.",
    "bool": "A bool is either True or False.",
    "None": "None is the value that stands for nothing.",
    "bytes": "A bytes object is a sequence of numbers from 0 to 255, written b'data'.",
    "function": "A function is a named piece of code that takes arguments and returns a value; def begins one.",
    "lambda": "A lambda is a small function without a name, such as lambda x: x + 1.",
    "class": "A class describes a kind of object: its data and its methods.",
    "object": "An object is a value together with the methods of its class.",
    "method": "A method is a function that belongs to a class; its first argument is self.",
    "self": "self is the object on which a method was called.",
    "module": "A module is a file of Python code that other code can import.",
    "package": "A package is a folder of modules.",
    "import": "import loads a module so that its names can be used.",
    "decorator": "A decorator is a function that wraps another function; it is written @name above it.",
    "generator": "A generator is a function with yield; it gives its values one at a time.",
    "iterator": "An iterator gives the next value each time next() is called on it.",
    "yield": "yield hands out a value and pauses the function until the next one is wanted.",
    "return": "return ends a function and hands back a value.",
    "exception": "An exception is an error that travels up the calls until something catches it.",
    "try": "try runs code and lets except handle the errors that it raises.",
    "raise": "raise starts an exception.",
    "with": "with opens a resource and closes it when the block ends.",
    "for loop": "A for loop runs its block once for each item of a collection.",
    "while loop": "A while loop repeats its block as long as a condition is true.",
    "if": "if runs its block only when a condition is true.",
    "range": "range(n) counts from 0 up to n - 1.",
    "len": "len(x) is the number of items in x.",
    "print": "print(x) writes x to the screen.",
    "sorted": "sorted(x) gives a new list with the items of x in order.",
    "append": "append(x) adds x to the end of a list.",
    "slice": "A slice takes a part of a sequence: x[1:3] holds the items 1 and 2.",
    "index": "An index is the position of an item; the first one is 0.",
    "comprehension": "A comprehension builds a list in one line: [x * x for x in numbers].",
    "recursion": "Recursion is when a function calls itself on a smaller problem.",
    "variable": "A variable is a name for a value.",
    "argument": "An argument is a value that is passed to a function.",
    "type hint": "A type hint says which type a value should have, such as x: int.",
    "dataclass": "A dataclass is a class whose fields are declared with types; Python writes its __init__.",
    "async": "async marks a function that can wait without blocking the others.",
    "await": "await pauses an async function until a result is there.",
    "thread": "A thread runs code beside other code in the same process.",
    "process": "A process is a running program with memory of its own.",
    "file": "A file is opened with open(path) and read with read().",
    "json": "json is a module that turns Python values into JSON text and back.",
    "regular expression": "A regular expression is a pattern for text; the module re searches with it.",
    "pip": "pip installs Python packages.",
    "virtual environment": "A virtual environment is a folder with its own Python packages.",
    "assert": "assert stops the program when a condition is false.",
    "docstring": "A docstring is the text at the start of a function that says what it does.",
    "global": "global lets a function assign a name of its module.",
    "hash": "A hash is a number computed from a value; dicts use it to find keys.",
    "bug": "A bug is a mistake in a program.",
    "test": "A test runs code and checks that the result is right.",
    "algorithm": "An algorithm is a list of exact steps that solves a problem.",
}

_WHO = (
    "I am a small DeepSeek-V4: the same architecture with about eleven million parameters, trained by this repository.",
    "I am a very small DeepSeek-V4, trained from nothing by the code of this repository.",
)
_CAN = (
    "I can add, subtract and multiply, compare numbers, sort and filter short lists, spell and reverse words, "
    "recall values, write JSON, and call a calculator. I know a few Python terms. I am small and make mistakes.",
    "Arithmetic, short lists, words, small formats such as JSON, and calculator calls. Try 47 + 85, for example.",
)
_CANNOT = "I am too small to know that. I can do arithmetic, short lists, words and a few Python terms."
_FIXED: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("Hello", "Hi", "hello", "hi", "Hey", "Hello!", "Hi there!", "Good morning", "Good evening", "hey there"),
     ("Hello! What shall we work on?", "Hello! Ask me for a sum, a sorted list or a reversed word.",
      "Hi! How can I help?")),
    (("Who are you?", "who are you", "What are you?", "What is your name?", "Tell me about yourself.",
      "Are you DeepSeek?", "Introduce yourself.", "Which model are you?", "Who made you?", "Who trained you?"), _WHO),
    (("What can you do?", "what can you do", "How can you help me?", "Help", "help", "What are you good at?",
      "What should I ask you?", "What are your skills?"), _CAN),
    (("Thanks", "Thank you", "Thank you!", "thanks a lot", "Great, thanks"), ("You are welcome.", "You are welcome!")),
    (("Bye", "Goodbye", "bye", "See you"), ("Goodbye!", "See you!")),
    (("How are you?", "How are you doing?", "how are you"), ("I am fine, thank you. What can I do for you?",)),
    (("Are you human?", "Are you a person?", "Are you a robot?"), ("No human, only a small language model.",)),
    (("Do you make mistakes?", "Can I trust you?", "Are you always right?"),
     ("I am small and make mistakes. Thinking mode makes me more careful.",)),
    (("How many parameters do you have?", "How big are you?", "How large is your network?"),
     ("About eleven million parameters; the large DeepSeek-V4 has more than a trillion.",)),
    (("What were you trained on?", "What is your training data?"),
     ("On the Python standard library, installed packages, their documentation and manual pages, and then on tasks.",)),
    (("What is the weather today?", "Who won the match yesterday?", "What time is it?", "Tell me the news.",
      "What is the capital of France?", "Who wrote Hamlet?", "Write a long story.", "Translate this to French."),
     (_CANNOT,)),
    (("ok", "OK", "Okay", "I see", "Good"), ("Good. What is next?", "Fine. What else?")),
]  # fmt: skip
_ASK = ("What is {a} {t} in Python?", "What does {t} mean in Python?", "Explain {t}.", "what is {t}",
        "What is {a} {t}?", "Define {t}.", "Tell me what {t} is in Python.")  # fmt: skip
_THINK = ("The user says something simple.\nI answer briefly.", "This needs no calculation.\nI answer in a sentence.")


def exchange(rng: random.Random) -> tuple[str, str, str]:
    """(what the user says, what the assistant thinks, what it answers)."""
    if rng.random() < 0.5:
        term, answer = rng.choice(list(TERMS.items()))
        article = "an" if term[0] in "aeiou" else "a"
        return rng.choice(_ASK).format(t=term, a=article), f"The term is {term}.\nI recall what it means.", answer
    questions, answers = rng.choice(_FIXED)
    return rng.choice(questions), rng.choice(_THINK), rng.choice(answers)


def conversation(rng: random.Random, mode: str) -> dict[str, Any]:
    """A Chat Completions body of one to three exchanges, the assistant's turns included."""
    messages: list[dict[str, Any]] = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        question, thoughts, answer = exchange(rng)
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    if mode == "non-think":
        return {"messages": messages, "thinking": {"type": "disabled"}}
    messages[-1]["reasoning_content"] = thoughts
    return {"messages": messages, "thinking": {"type": "enabled"}, "reasoning_effort": mode}
