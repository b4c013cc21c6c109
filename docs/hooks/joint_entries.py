"""An extension of Griffe: an entry of a docstring that is for several parameters becomes one for each of them.

lora_A, lora_B: matrices of the adapters
"""

import re

from griffe import Extension

JOINT = re.compile(
    r"^(?P<indent> +)(?P<names>\w+(?:, \w+)+):(?P<text> .*(?:\n(?P=indent) +\S.*)*)",
    re.MULTILINE,
)


def separate(docstring):
    def entries(joint):
        return "\n".join(f"{joint['indent']}{name}:{joint['text']}" for name in joint["names"].split(", "))

    return JOINT.sub(entries, docstring)


class JointEntries(Extension):
    def on_instance(self, *, obj, **kwargs):
        if obj.docstring:
            obj.docstring.value = separate(obj.docstring.value)
