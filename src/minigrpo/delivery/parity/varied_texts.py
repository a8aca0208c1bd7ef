"""Fixed texts of many kinds, for proofs beside the task's own: what a model says elsewhere must be kept, too.

Prose, letters, dialogue, instructions, maths, tables, data, programs, and other scripts; nothing here stands in a data
set that we know of. `delivery/parity/texts.py` scores every token of them after the first.
"""

from __future__ import annotations

VARIED_TEXTS = (
    "The ferry left the harbour an hour late, and nobody on the quay seemed surprised. Fog had settled over the "
    "water during the night; the captain drank his tea, looked at the chart once more, and decided that the "
    "channel could wait until the buoys were in sight again.",
    "My grandmother kept bees behind the orchard. In July she would lift the lids with bare hands, hum a tune "
    "that had only three notes, and count the frames aloud. Strangers thought that she was brave. She said that "
    "bees simply do not care for people who hurry.",
    "Dear Ms Okafor,\n\nThank you for your letter of 3 May. We have checked the invoice again, and you are "
    "right: the second delivery was charged twice. The difference of 148.50 will reach your account within ten "
    "days. Please accept our apologies.\n\nKind regards,\nTheo Lindqvist",
    '"Did you lock the shed?"\n"I thought you had the key."\n"The key is on the hook, where it always is."\n'
    '"Then the shed is open, because the hook is empty."\nThey looked at each other, and then at the dog, who '
    "wagged his tail.",
    "A glacier moves because ice under pressure deforms like a very stiff liquid. Near its surface it is brittle "
    "and cracks into crevasses; deeper down it flows, a few centimetres to a few metres a day, faster in the "
    "middle than along the walls of the valley.",
    "How to repot a plant: water it the day before. Choose a pot that is two fingers wider. Put a layer of "
    "gravel at the bottom, then soil. Loosen the roots with your thumbs, set the plant in the middle, fill up, "
    "press gently, and keep it out of the sun for a week.",
    "Minutes of the meeting, 14 October. Present: five of seven members. 1. The roof: two offers were compared; "
    "the cheaper one leaves out the gutters. 2. The garden: the hedge stays. 3. Any other business: none. The "
    "next meeting is on 11 November at seven.",
    "Once there was a clockmaker who could not tell the time. He built the finest clocks in the province, each "
    "of them right to the second, and asked his customers what they said. When he died, every clock in the town "
    "struck at once, and no two of them agreed.",
    "Let n be an odd number. Then n = 2k + 1 for some whole number k, and n squared is 4k(k + 1) + 1. One of k "
    "and k + 1 is even, so 4k(k + 1) is a multiple of eight. Hence the square of every odd number leaves the "
    "remainder 1 when it is divided by 8.",
    "A tank holds 240 litres. One pump fills it in 8 minutes, another empties it in 12. Together they change its "
    "content by 240/8 - 240/12 = 30 - 20 = 10 litres a minute, so an empty tank is full after 24 minutes.",
    "$$\\int_0^1 x^2 (1 - x)\\,dx = \\left[\\frac{x^3}{3} - \\frac{x^4}{4}\\right]_0^1 = \\frac{1}{3} - "
    "\\frac{1}{4} = \\frac{1}{12}$$\nThe expected value of a variable with the density $6x(1-x)$ on $[0, 1]$ is "
    "$\\frac{1}{2}$ by symmetry.",
    "3 + 4 * 2 = 11\n(3 + 4) * 2 = 14\n17 % 5 = 2\n2 ** 10 = 1024\n0.1 + 0.2 = 0.30000000000000004\n144 / 12 = "
    "12\n1,250,000 / 40 = 31,250\n-7 // 2 = -4\n5! = 120\nsqrt(2) = 1.41421356",
    "def merge_sorted(left, right):\n    found, i, j = [], 0, 0\n    while i < len(left) and j < "
    "len(right):\n        if left[i] <= right[j]:\n            found.append(left[i])\n            i += "
    "1\n        else:\n            found.append(right[j])\n            j += 1\n    return found + left[i:] + "
    "right[j:]\n",
    "class Account:\n    def __init__(self, owner: str, balance: float = 0.0) -> None:\n        self.owner = "
    "owner\n        self.balance = balance\n\n    def withdraw(self, amount: float) -> None:\n        if amount "
    '> self.balance:\n            raise ValueError(f"{self.owner} has only {self.balance:.2f}")\n        '
    "self.balance -= amount\n",
    "#include <stdio.h>\n\nint main(void) {\n    for (int i = 1; i <= 15; i++) {\n        if (i % 15 == 0) "
    'puts("FizzBuzz");\n        else if (i % 3 == 0) puts("Fizz");\n        else if (i % 5 == 0) '
    'puts("Buzz");\n        else printf("%d\\n", i);\n    }\n    return 0;\n}\n',
    "const total = orders\n  .filter((order) => order.paid && !order.refunded)\n  .map((order) => "
    "order.lines.reduce((sum, line) => sum + line.price * line.count, 0))\n  .reduce((sum, each) => sum + each, "
    "0);\n\nconsole.log(`Total: ${total.toFixed(2)}`);\n",
    "SELECT city, COUNT(*) AS customers, ROUND(AVG(spent), 2) AS mean_spent\nFROM customers\nJOIN orders USING "
    "(customer_id)\nWHERE ordered_on >= DATE '2024-01-01'\nGROUP BY city\nHAVING COUNT(*) > 20\nORDER BY "
    "mean_spent DESC\nLIMIT 10;\n",
    '#!/bin/sh\nset -eu\nfor file in "$@"; do\n    size=$(wc -c < "$file")\n    if [ "$size" -gt 1048576 ]; '
    'then\n        gzip --keep --best "$file" && echo "$file: packed"\n    fi\ndone\n',
    '{"id": 4711, "name": "Anna Kowalska", "tags": ["new", "priority"], "address": {"street": "Long Lane 12", '
    '"city": "Leeds", "postcode": null}, "orders": [{"sku": "B-220", "count": 3, "price": 12.5}], "active": '
    "true}\n",
    "name: build\non: [push]\njobs:\n  test:\n    runs-on: ubuntu-latest\n    steps:\n      - uses: "
    "actions/checkout@v4\n      - run: pip install -e .[dev]\n      - run: pytest -q\n",
    "| month | rain (mm) | sun (h) |\n|---|---|---|\n| January | 71 | 42 |\n| April | 39 | 168 |\n| July | 58 | "
    "221 |\n| October | 83 | 97 |\n\n**Driest:** April. **Sunniest:** July.\n",
    '<!DOCTYPE html>\n<html lang="en">\n<head><title>Opening hours</title></head>\n<body>\n<h1>Opening '
    "hours</h1>\n<ul>\n<li>Monday to Friday: 9 am to 6 pm</li>\n<li>Saturday: 10 am to 2 pm</li>\n</ul>\n"
    "</body>\n</html>\n",
    "Der Zug nach Norden hielt an jeder Station, und an jeder stiegen mehr Menschen aus als ein. Am Ende sass "
    "nur noch eine Frau mit einem Cello im Wagen. Sie fragte den Schaffner, ob sie üben dürfe; er sagte, die "
    "Strecke sei lang genug für eine ganze Sonate.",
    "Le boulanger du village se levait à trois heures. À cinq heures, l'odeur du pain réveillait la place; à six "
    "heures, les premiers clients attendaient déjà, les mains dans les poches, en parlant de la pluie qui ne "
    "venait pas.",
    "En el mercado, la señora de las flores sabía el nombre de todos los niños. Les regalaba margaritas un poco "
    "marchitas y les decía que, si las ponían en agua con azúcar, vivirían hasta el domingo.",
    "Старый мост через реку закрыли весной. Рабочие сняли доски, покрасили перила и пообещали закончить к осени. "
    "Рыбаки по-прежнему приходили сюда по утрам и ставили удочки там, где раньше проезжали телеги.",
    "村子东边有一口老井,井水冬天温热,夏天冰凉。老人们说,从前旅人经过这里,总要停下"
    "来喝一碗水,再继续赶路。现在大家都用自来水了,但孩子们还是喜欢往井里看自己的影子。",
    "駅前の小さな本屋は、雨の日だけ朝七時に開く。店主は傘を忘れた客に古い新聞を貸し、"
    "代わりに好きな本の題名を一つ聞く。ノートには、もう三千の題名が並んでいる。",
    "كان البحر هادئًا في ذلك الصباح. جلس الصياد على حافة قاربه يصلح شبكته، ونظر إلى الأفق حيث تلتقي السماء "
    "بالماء، ثم قال لابنه إن الصبر هو نصف الرزق.",
    "गाँव के स्कूल में केवल एक घंटी थी, और उसे बजाने का काम हर हफ़्ते किसी नए बच्चे को मिलता था। जिस दिन मीना की "
    "बारी आई, वह सूरज निकलने से पहले ही पहुँच गई।",
    "Q: What is the difference between weather and climate?\nA: Weather is what happens today; climate is what "
    "usually happens over decades.\nQ: So one cold winter says little?\nA: Yes. Thirty cold winters would say "
    "something.\n",
    "2024-02-11 08:14:03 INFO  server started on port 8080\n2024-02-11 08:14:09 WARN  cache is cold, first "
    "requests are slow\n2024-02-11 08:15:42 ERROR request 7f3a: timeout after 30 s (upstream 10.0.4.17)\n"
    "2024-02-11 08:15:43 INFO  retry 1 of 3 for request 7f3a\n",
    "Emoji and signs: 🙂 👩\u200d🔬 ☔ → ← ≤ ≥ ≠ ± µ Ω € £ ¥ § ¶ © ™ … – — “quoted” ‘single’ ½ ² ₃ ✓ ✗. Spaces  "
    "twice, a\ttab, and\u00a0one that does not break.\r\nWindows ends its lines like this.\r\n",
)
"""Some 2,300 tokens as a model with a large vocabulary counts them."""
