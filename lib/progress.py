"""
Progress of anything longer than a few seconds.
"""
import sys

from tqdm import tqdm

from lib import ranks

PLAIN = "{desc}: {n_fmt} of {total_fmt} {unit}, {elapsed} gone, {remaining} left, {rate_fmt}{postfix}\n"


def progress(items, what, unit):
    """tqdm: a bar on a terminal, elsewhere a true line at most every half minute.

    items  an iterable, or a number to update by hand
    A postfix is set with refresh=False: it shows with the next line.
    """
    counted = {"total": items} if isinstance(items, int) else {"iterable": items}
    # miniters=1 looks at the clock at every step: tqdm's own guess, and its monitor, print counts long past
    plain = {} if sys.stderr.isatty() else {"mininterval": 30, "miniters": 1, "delay": 30,
                                            "bar_format": PLAIN}
    tqdm.monitor_interval = 0
    return tqdm(**counted, disable=ranks.rank() > 0, desc=what, unit=unit, unit_scale=unit == "img",
                leave=False, **plain)
