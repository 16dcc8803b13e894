"""Made questions to the support desk of a shop, and its answers: the data of `make demo-support`.

A question is put together from an opening with the customer's name, what happened, and what is asked.
The answers follow the rules and the tone of one shop, and repeat the customer's name. A model of this size
copies no longer numbers, so the orders that are looked up have one digit. The base model has seen questions
of this kind, answered by other shops.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from canvastune.tiny_model import write_rows

ROWS, TOOL_ROWS = 300, 20

NAMES = (
    *("Ada", "Alma", "Amir", "Anna", "Ben", "Carl", "Clara", "Dana", "David", "Elena", "Emil"),
    *("Eva", "Fatma", "Felix", "Finn", "Grace", "Hana", "Hugo", "Ida", "Ines", "Iris", "Ivan"),
    *("Jana", "Jonas", "Julia", "Karim", "Kim", "Lara", "Leo", "Lina", "Lucas", "Maria", "Max"),
    *("Mia", "Mona", "Nadia", "Nils", "Noah", "Nora", "Olga", "Omar", "Oscar", "Paul"),
    *("Peter", "Rita", "Robin", "Rosa", "Ruth", "Sam", "Sara", "Simon", "Sofia", "Tara", "Theo"),
    *("Tom", "Vera", "Victor", "Yara", "Zoe"),
)
ITEMS = (
    *("backpack", "bench", "bike", "blanket", "camera", "carpet", "chair", "clock", "coat", "desk"),
    *(
        "drill",
        "fan",
        "grill",
        "guitar",
        "helmet",
        "jacket",
        "kettle",
        "keyboard",
        "lamp",
        "mirror",
    ),
    *("mixer", "monitor", "oven", "pan", "phone", "pillow", "printer", "radio", "shelf", "shirt"),
    *("speaker", "suitcase", "table", "tent", "toaster", "vase", "watch"),
)
CITIES = (
    *("Athens", "Basel", "Berlin", "Bern", "Bonn", "Bremen", "Dublin", "Geneva", "Graz", "Hamburg"),
    *("Kiel", "Leipzig", "Lisbon", "London", "Lyon", "Madrid", "Milan", "Munich", "Oslo", "Paris"),
    *("Porto", "Prague", "Riga", "Rome", "Turin", "Ulm", "Vienna", "Warsaw", "Zurich"),
)


@dataclass(frozen=True)
class Topic:
    """What customers ask about, and what the shop answers. Texts have {slots}."""

    group: str  # the column `topic` of the rows
    happened: tuple[str, ...]
    asked: tuple[str, ...]
    answer: str


TOPICS = {
    "return": Topic(
        "returns",
        (
            "The {item} from order {order} does not fit.",
            "I do not like the {item} from order {order}.",
            "The {item} in order {order} is too small.",
            "Order {order} came with the wrong {item}.",
            "I have two now, as the {item} in order {order} was a gift too.",
        ),
        (
            "Can I send it back?",
            "How do I return it?",
            "Do you take it back?",
            "I want to return it.",
            "What do I do to send it back?",
        ),
        "you can return it within 45 days. Print the label in your account and bring the box "
        "to a post office.",
    ),
    "refund": Topic(
        "returns",
        (
            "I sent back order {order}.",
            "You have had order {order} back for a week.",
            "My return of order {order} is with you.",
            "Order {order} went back to you.",
        ),
        (
            "When do I get my money?",
            "Where is my money?",
            "How long does the refund take?",
            "When will you pay it back?",
        ),
        "the refund takes 4 days from the day it is back with us. We pay it to the card that "
        "you used.",
    ),
    "broken": Topic(
        "returns",
        (
            "The {item} from order {order} came broken.",
            "My new {item} has a crack, the order is {order}.",
            "The {item} in order {order} does not work.",
            "A part of the {item} is missing in order {order}.",
        ),
        (
            "Can I get a new one?",
            "What now?",
            "Please send me another one.",
            "What will you do about it?",
        ),
        "we are sorry about that. Send us a photo with the number of the order, and a new one"
        " leaves our house today.",
    ),
    "warranty": Topic(
        "returns",
        (
            "My {item} is broken after a year.",
            "I have had the {item} for two years, and now it does not work.",
            "The {item} that I bought last year makes a noise.",
            "My old {item} stopped.",
        ),
        (
            "Is there a warranty?",
            "Do you repair it?",
            "Can you repair that?",
            "Who pays for the repair?",
        ),
        "it has a warranty of 3 years. Bring it to our workshop with the receipt, and we "
        "repair it for free.",
    ),
    "time": Topic(
        "shipping",
        (
            "I live in {city}.",
            "I want to order the {item} to {city}.",
            "The {item} should go to {city}.",
            "I need the {item} in {city}.",
        ),
        (
            "How long does it take?",
            "When will it be here?",
            "How many days is that?",
            "How fast are you?",
        ),
        "a parcel takes 3 days. Order before noon, and it leaves our house today.",
    ),
    "cost": Topic(
        "shipping",
        (
            "I live in {city}.",
            "I want to order the {item} to {city}.",
            "The {item} should go to {city}.",
            "I want to send the {item} to a friend in {city}.",
        ),
        (
            "What does shipping cost?",
            "How much is shipping?",
            "Do I pay for shipping?",
            "Is shipping free?",
        ),
        "shipping costs 4 euros. It is free if you order for more than 60 euros.",
    ),
    "address": Topic(
        "shipping",
        (
            "I moved to {city}, and order {order} has my old address.",
            "Order {order} should go to {city}.",
            "I will be in {city} when order {order} is sent.",
            "My new home is in {city}, it is about order {order}.",
        ),
        (
            "Can you change the address?",
            "How do I change the address?",
            "Is that still possible?",
            "Please change it.",
        ),
        "we can change the address until the order is packed. Enter the new street in your "
        "account under Addresses.",
    ),
    "cancel": Topic(
        "orders",
        (
            "I do not need order {order} now.",
            "Order {order} was a mistake.",
            "I want something else than order {order}.",
            "It is about order {order}, I changed my mind.",
        ),
        (
            "Can I cancel it?",
            "How do I cancel?",
            "Please cancel it.",
            "Can you stop it?",
        ),
        "open the order in your account and press Cancel. After 2 hours it is packed, and you"
        " can only send it back.",
    ),
    "invoice": Topic(
        "orders",
        (
            "I need an invoice for order {order}.",
            "My company wants a bill for order {order}.",
            "There was no invoice with order {order}.",
            "I lost the invoice of order {order}.",
        ),
        (
            "Where do I find it?",
            "Can you send it to me?",
            "How do I get it?",
            "Please send it by mail.",
        ),
        "the invoice is in your account under Documents. We do not send it on paper.",
    ),
    "stock": Topic(
        "orders",
        (
            "The {item} is sold out.",
            "I can not order the {item}.",
            "Your page says that there is no {item}.",
            "I have been waiting for the {item}.",
        ),
        (
            "When is it back?",
            "Will you get more?",
            "When can I buy it?",
            "Do you get a new one?",
        ),
        "it is back in 2 weeks. Press Tell me on its page, and you get a mail on that day.",
    ),
    "password": Topic(
        "account",
        (
            "I forgot my password.",
            "I can not sign in.",
            "My password does not work.",
            "My account is locked.",
        ),
        (
            "How do I get a new one?",
            "What can I do?",
            "Please help me.",
            "How do I get in?",
        ),
        "press Forgot password where you sign in. The link in our mail is good for 20 minutes.",
    ),
    "voucher": Topic(
        "account",
        (
            "I have a voucher.",
            "A friend gave me a voucher.",
            "I got a voucher for {item}s and more.",
            "My voucher is from last year.",
        ),
        (
            "How do I use it?",
            "Where do I enter it?",
            "Can I use it now?",
            "How long is it good for?",
        ),
        "enter the code of your voucher in the cart before you pay. It is good for 3 years.",
    ),
}
STATUS = Topic(
    "status",
    (
        "I am waiting for order {order}.",
        "Order {order} is not here.",
        "I ordered a week ago, the number is {order}.",
        "It is about my order {order}.",
    ),
    (
        "Where is it?",
        "When will it be here?",
        "Has it left?",
        "Can you look where it is?",
    ),
    "your order is {status}. You get a mail when that changes.",
)
STATUSES = (
    "packed",
    "on the way to {city}",
    "at the post office in {city}",
    "with the driver in {city}",
    "still in our house",
)
_DESK_STATUSES = ("packed", "on the way", "at the post office", "with the driver", STATUSES[-1])
FIND_ORDER = {
    "type": "function",
    "function": {
        "name": "find_order",
        "description": "Where an order is",
        "parameters": {
            "type": "object",
            "properties": {"id": {"type": "string"}},
            "required": ["id"],
        },
    },
}

_OPENINGS = (
    *("Hi, I am {name}. {text}", "Hello, {name} here. {text}", "This is {name}. {text}"),
    *("My name is {name}. {text}", "{text} Thanks, {name}", "{text} Best, {name}"),
    *("Hello! {text} {name}", "Good morning, this is {name}. {text}"),
)


def write_support_rows(path: Path, seed: int = 0) -> None:
    """Write 300 rows, of them 20 conversations with a tool, as JSON lines.

    {"topic", "messages"}, and {"tools"} where the desk has a tool. The same seed gives the same bytes.
    """
    rng = random.Random(f"support-{seed}")
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < ROWS:
        write = _status_row if len(rows) < TOOL_ROWS else _prose_row
        row = write(rng)
        rows.setdefault(row["messages"][0]["content"], row)
    shuffled = list(rows.values())
    rng.shuffle(shuffled)
    write_rows(path, shuffled)


def draw_slots(rng: random.Random) -> dict[str, str]:
    """Draw a value for each slot of the texts."""
    slots = {
        "name": rng.choice(NAMES),
        "item": rng.choice(ITEMS),
        "city": rng.choice(CITIES),
        "order": str(rng.randint(1000, 9999)),
    }
    return slots | {"status": rng.choice(STATUSES).format(**slots)}


def ask(topic: Topic, slots: dict[str, str], rng: random.Random) -> str:
    """Write a question about a topic."""
    parts = [rng.choice(topic.happened), rng.choice(topic.asked)]
    if rng.random() < 0.2:
        parts.reverse()
    return rng.choice(_OPENINGS).replace("{text}", " ".join(parts)).format(**slots)


def tool_row(
    question: str, tool: dict[str, Any], argument: str, response: str, answer: str
) -> dict[str, Any]:
    """Write a conversation in which the desk looks something up before it answers."""
    function = tool["function"]
    (parameter,) = function["parameters"]["properties"]
    call = {"name": function["name"], "arguments": {parameter: argument}}
    return {
        "tools": [tool],
        "messages": [
            {"role": "user", "content": question},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "type": "function", "function": call}],
            },
            {"role": "tool", "tool_call_id": "1", "content": response},
            {"role": "assistant", "content": answer},
        ],
    }


def _prose_row(rng: random.Random) -> dict[str, Any]:
    topic, slots = TOPICS[rng.choice(list(TOPICS))], draw_slots(rng)
    return {
        "topic": topic.group,
        "messages": [
            {"role": "user", "content": ask(topic, slots, rng)},
            {"role": "assistant", "content": _answer(topic, slots)},
        ],
    }


def _status_row(rng: random.Random) -> dict[str, Any]:
    status, order = rng.choice(_DESK_STATUSES), str(rng.randint(2, 9))
    slots = draw_slots(rng) | {"status": status, "order": order}
    question, answer = ask(STATUS, slots, rng), _answer(STATUS, slots)
    row = tool_row(question, FIND_ORDER, slots["order"], slots["status"], answer)
    return {"topic": STATUS.group, **row}


def _answer(topic: Topic, slots: dict[str, str]) -> str:
    return f"Hi {slots['name']}, {topic.answer.format(**slots)}"
