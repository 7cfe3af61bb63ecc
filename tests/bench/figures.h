/* SPDX-License-Identifier: MIT */
/* For the benchmarks: clocks, figures of several rounds, and targets. */
#ifndef VFU_TESTS_BENCH_FIGURES_H
#define VFU_TESTS_BENCH_FIGURES_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { ROUNDS_MAX = 101 };

static inline double read_clock(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static inline double now_ns(void) { return read_clock(CLOCK_MONOTONIC); }

static inline int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* What was measured in each round, and what it comes to. */
typedef struct figure {
    double round[ROUNDS_MAX], median, least, greatest;
} figure;

static inline void settle(figure *f, int rounds)
{
    double sorted[ROUNDS_MAX];
    memcpy(sorted, f->round, (size_t)rounds * sizeof(sorted[0]));
    qsort(sorted, (size_t)rounds, sizeof(sorted[0]), compare);
    f->least = sorted[0];
    f->median = sorted[rounds / 2];
    f->greatest = sorted[rounds - 1];
}

static inline void print_figure(const figure *f, int digits)
{
    char spread[40];
    snprintf(spread, sizeof(spread), "%.*f..%.*f", digits, f->least, digits, f->greatest);
    printf(" |%8.*f  %-14s", digits, f->median, spread);
}

/* Prints a line, and says whether the target was met. */
static inline int target(const char *what, double is, double at_most, const char *unit)
{
    printf("  %-60s %8.2f %-2s  target %6.4g  %s\n", what, is, unit, at_most, is <= at_most ? "yes" : "NO");
    return is <= at_most;
}

#endif /* VFU_TESTS_BENCH_FIGURES_H */
