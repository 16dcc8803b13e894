"""Questions to the support desks of other shops, with their answers: what the support base learns.

The questions are of the same kind as those of `pipelines/support_desk.py`. The answers have other words,
rules and names of tools: none of that desk's own answers is among them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from canvastune.tiny_model import write_rows
from pipelines.support_desk import STATUS, TOPICS, ask, draw_slots, tool_row

ROWS = 16_000
_TOOL_SHARE = 0.12

_GREETINGS = (
    "Dear {name}, thank you for your message.",
    "Hello {name}, thanks for asking.",
    "Good day {name}.",
    "{name}, here is what we can do.",
)
_ENDINGS = ("", "", "Best, {shop}", "Your {shop} team", "Is there more we can do?")
_SHOPS = ("Alto", "Berg", "Corner", "Delta", "Field", "Garden", "Home", "North", "Park", "River")
_MENUS = (
    "Addresses",
    "Cancel",
    "Documents",
    "Forgot",
    "Help",
    "Orders",
    "Print",
    "Profile",
    "Tell",
)
_ANSWERS = {
    "return": (
        "Send the {item} back within {n} days. The label for order {order} is in the box.",
        "We take the {item} back for {n} days. Write order {order} on the box and give it"  # prose: ok
        " to the driver.",
        "You have {n} days for the return of order {order}. Bring the {item} to one of our shops.",
    ),
    "refund": (
        "Order {order} is paid back within {n} days. You get the money on your card.",
        "We need {n} days to look at order {order}, then your bank gets the refund.",
        "It takes {n} days until the money for order {order} is in your account.",
    ),
    "broken": (
        "That is not good. Please bring the {item} and the receipt of order {order} to a shop.",
        "We are sorry that the {item} is broken. A new one for order {order} is there in {n} days.",
        "Please send us a photo of the {item}, and we pay back order {order} in {n} days.",
    ),
    "warranty": (
        "For your {item} there is a warranty of {n} months. Send it to our workshop.",
        "We repair the {item} within {n} days. You only pay for the parts.",
        "After {n} years you pay for the repair of the {item}. Ask the workshop for the cost.",
    ),
    "time": (
        "We need {n} days to {city}. You get a mail when the parcel leaves.",
        "Our driver is in {city} every {n} days. Please be at home before noon.",
        "Parcels are in {city} after {n} days. If you pay more, it is sent today.",
    ),
    "cost": (
        "A parcel to {city} costs {n} euros. In our shop you can get it for free.",
        "You pay {n} euros for shipping to {city}, and more than that if the parcel is big.",
        "To {city} it is free until you order more than {n} things.",
    ),
    "address": (
        "We changed the address of order {order}. It will go to {city}.",
        "Please write us the street and number in {city}, under {menu}, and we change order {order}.",
        "Order {order} has left our house. Ask the post office to send it on to {city}.",
    ),
    "cancel": (
        "You can stop order {order} until it is {n} hours old. Press {menu} on its page.",
        "Order {order} is canceled, and you get your money in {n} days.",
        "Sorry, order {order} has left. Send it back when it is there, the return is free.",
    ),
    "invoice": (
        "We send you the invoice of order {order} by mail in {n} days.",
        "Look in the box of order {order}: the bill is on paper under the label.",
        "Press {menu} on the page of order {order}, and you get the invoice.",
    ),
    "stock": (
        "We do not sell the {item} now. Ask us in {n} days, or look where you live.",
        "If that changes, you get a mail about the {item} within {n} days.",
        "You can still buy the {item} in our shop, and in {n} weeks on our page.",
    ),
    "password": (
        "We send you a link for a new password. You can use it for {n} hours to sign in.",
        "Enter the mail address that you used on the page {menu}, and you get a code.",
        "Your account is open again after {n} minutes. If that does not help, press {menu}.",
    ),
    "voucher": (
        "Show your voucher in one of our shops, for {n} years from the day you got it.",
        "Put something in your cart, press {menu} and enter the {n} digits of the voucher.",
        "A voucher is good for {n} months. Write its code under your address.",
    ),
}
_STATUS_ANSWERS = (
    "Your order is {status}, its number is {order}.",
    "We see that order {order} is {status}. Ask me again if it changes.",
    "I looked at order {order} for you. It is {status}.",
)
# Not learned: only the tokenizer knows their words.
_MORE_ANSWERS = (
    "you can return the {item} within 45 days. Print the label of order {order} in your account"
    " and bring the box to a post office.",
    "the refund for order {order} takes 4 days from the day it is back with us. We pay it to the card that you used.",
    "we are sorry about the {item}. Send us a photo with the number {order}, and a new one leaves our house today.",
    "the {item} has a warranty of 3 years. Bring it to our workshop with the receipt, and we repair it for free.",
    "a parcel to {city} takes 3 days. Order before noon, and it leaves our house today.",
    "shipping to {city} costs 4 euros. It is free if you order for more than 60 euros.",
    "order {order} can still go to {city} until it is packed. Enter the new street in your account under Addresses.",
    "open order {order} in your account and press Cancel. After 2 hours it is packed, and you can only send it back.",
    "the invoice for order {order} is in your account under Documents. We do not send it on paper.",
    "the {item} is back in 2 weeks. Press Tell me on its page, and you get a mail on that day.",
    "press Forgot password where you sign in. The link in our mail is good for 20 minutes.",
    "enter the code of your voucher in the cart before you pay. It is good for 3 years.",
    "order {order} is {status}. You get a mail when that changes.",
)
_TOOL_WORDS = ("find_order", "Where an order is", "order")
_TOOLS = (
    ("get_parcel", "Find a parcel", "number"),
    ("look_up", "Look up an order", "code"),
    ("track", "Where a parcel is now", "parcel"),
    ("check_order", "Find the order of a customer", "id"),
    ("order_status", "Status of an order", "order_id"),
)


def write_other_shops(path: Path, rows: int = ROWS, seed: int = 0) -> None:
    """Write conversations of other shops as JSON lines. The same seed gives the same bytes."""
    rng = random.Random(f"other-shops-{seed}")
    found: dict[str, dict[str, Any]] = {}
    while len(found) < rows:
        row = _status_row(rng) if rng.random() < _TOOL_SHARE else _prose_row(rng)
        found.setdefault(row["messages"][0]["content"], row)
    write_rows(path, found.values())


def texts(path: Path) -> Iterable[str]:
    """Return what a tokenizer learns the words of these rows, and of a few more answers, from."""
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        for function in [tool["function"] for tool in row.get("tools", ())]:
            yield from (function["name"], function["description"])
            yield from function["parameters"]["properties"]
        yield from _TOOL_WORDS
        for message in row["messages"]:
            yield message["content"] or ""
    for text in _MORE_ANSWERS:
        yield text.replace("{", " ").replace("}", " ")


def _prose_row(rng: random.Random) -> dict[str, Any]:
    kind, slots = rng.choice(list(TOPICS)), draw_slots(rng)
    answer = _answer(rng.choice(_ANSWERS[kind]), slots, rng)
    return {
        "messages": [
            {"role": "user", "content": ask(TOPICS[kind], slots, rng)},
            {"role": "assistant", "content": answer},
        ]
    }


def _status_row(rng: random.Random) -> dict[str, Any]:
    slots = draw_slots(rng)
    answer = _answer(rng.choice(_STATUS_ANSWERS), slots, rng)
    name, description, parameter = rng.choice(_TOOLS)
    tool = {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {parameter: {"type": "string"}},
                "required": [parameter],
            },
        },
    }
    return tool_row(ask(STATUS, slots, rng), tool, slots["order"], slots["status"], answer)


def _answer(body: str, slots: dict[str, str], rng: random.Random) -> str:
    text = f"{rng.choice(_GREETINGS)} {body} {rng.choice(_ENDINGS)}"
    drawn = {"n": rng.randint(2, 60), "shop": rng.choice(_SHOPS), "menu": rng.choice(_MENUS)}
    return text.format(**drawn, **slots).strip()
