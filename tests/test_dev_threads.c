/* SPDX-License-Identifier: MIT */
/*
 * ==== device ====
 *
 * What other threads may do: raise interrupts while the client assigns and takes away eventfds, stop the loop; and many devices in as
 * many threads, which share nothing but the process's handler for SIGBUS.
 */
#include "util.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>

static unsigned fds_at_start;
static void note_fds(void) { fds_at_start = fds_open(); }
static void check_fds(void) { ck_assert_uint_eq(fds_open(), fds_at_start); }

/* ---- raise ------------------------------------------------------------------------------------------------------------------------------------ */

enum { RAISERS = 6, ASSIGNMENTS = 40, EVENTFD_TRIGGER = VFU_IRQ_SET_DATA_EVENTFD | VFU_IRQ_SET_ACTION_TRIGGER };

static rig R;
static atomic_bool raising;
static atomic_ulong raised;

static void *raise_for_ever(void *arg)
{
    unsigned long vector = (uintptr_t)arg;
    while (atomic_load(&raising)) {
        int err = vfu_dev_raise(R.dev, VFU_PCI_IRQ_MSIX, (uint32_t)(vector++ % RIG_VECTORS));
        ck_assert(err == 0 || err == -ENOENT);
        atomic_fetch_add(&raised, err == 0);
    }
    return NULL;
}

/* From the reply on, an interrupt goes where the client has said: to the new eventfd, and no more to the old one, which is closed and
 * whose number may be anything else's by then. An endless stream of interrupts doesn't hold up the client. */
START_TEST(raise_while_the_client_assigns)
{
    pthread_t threads[RAISERS];
    rig_open(&R);
    unsigned open = fds_open();
    atomic_store(&raising, true);
    for (uintptr_t i = 0; i < RAISERS; i++)
        ck_assert_int_eq(pthread_create(&threads[i], NULL, raise_for_ever, (void *)i), 0);
    for (unsigned round = 0; round < ASSIGNMENTS; round++) {
        int events[RIG_VECTORS], others[RIG_VECTORS];
        unsigned start = round % RIG_VECTORS, count = RIG_VECTORS - start;
        for (unsigned v = 0; v < RIG_VECTORS; v++) {
            events[v] = event();
            others[v] = event();
        }
        ck_assert_int_eq(ask_irqs(&R, EVENTFD_TRIGGER, 2, 0, RIG_VECTORS, NULL, events, RIG_VECTORS), 0);
        struct pollfd ready = {.fd = events[start], .events = POLLIN};
        ck_assert_int_eq(poll(&ready, 1, PATIENCE_MS), 1); /* it arrives */
        /* the next ones of some, then none */
        ck_assert_int_eq(ask_irqs(&R, EVENTFD_TRIGGER, 2, start, count, NULL, others + start, count), 0);
        for (unsigned v = 0; v < RIG_VECTORS; v++)
            signals(events[v]);
        ready.fd = others[start];
        ck_assert_int_eq(poll(&ready, 1, PATIENCE_MS), 1);
        for (unsigned v = start; v < RIG_VECTORS; v++)
            ck_assert_uint_eq(signals(events[v]), 0);
        if (round % 2)
            ck_assert_int_eq(ask_irqs(&R, EVENTFD_TRIGGER, 2, 0, RIG_VECTORS, NULL, NULL, 0), 0);
        else
            ck_assert_int_eq(ask_irqs(&R, VFU_IRQ_SET_DATA_NONE | VFU_IRQ_SET_ACTION_TRIGGER, 2, 0, 0, NULL, NULL, 0), 0);
        for (unsigned v = 0; v < RIG_VECTORS; v++) {
            signals(events[v]);
            signals(others[v]);
        }
        check_healthy(&R);
        for (unsigned v = 0; v < RIG_VECTORS; v++) {
            ck_assert_uint_eq(signals(events[v]), 0);
            ck_assert_uint_eq(signals(others[v]), 0);
        }
        close_fds(events, RIG_VECTORS);
        close_fds(others, RIG_VECTORS);
    }
    rig_leave(&R); /* with the threads at work */
    atomic_store(&raising, false);
    for (unsigned i = 0; i < RAISERS; i++)
        pthread_join(threads[i], NULL);
    ck_assert_uint_gt(atomic_load(&raised), 0);
    ck_assert_uint_eq(fds_open(), open - 2); /* but for the connection */
    rig_destroy(&R);
}
END_TEST

/* ---- run and stop ------------------------------------------------------------------------------------------------------------------------------ */

static int run_result;
static void *run(void *arg)
{
    run_result = vfu_dev_run(arg);
    return NULL;
}

/* Sends VERSION and GET_INFO and waits for the answers. */
static void talk(peer *p)
{
    uint8_t bytes[64];
    vfu_wire_header headers[2] = {{.id = 1, .cmd = VFU_CMD_VERSION, .size = 20}, {.id = 2, .cmd = VFU_CMD_DEVICE_GET_INFO, .size = 32}};
    vfu_wire_device_info info = {.argsz = 16};
    memset(bytes, 0, sizeof(bytes));
    memcpy(bytes, &headers[0], 16);
    memcpy(bytes + 20, &headers[1], 16);
    memcpy(bytes + 36, &info, 16);
    ck_assert(peer_send_wait(p, bytes, 52, NULL, 0));
    for (uint16_t id = 1; id <= 2; id++) {
        ck_assert_int_eq(peer_wait(p), 1);
        ck_assert_uint_eq(header_of(p->bytes).id, id);
        ck_assert_uint_eq(header_of(p->bytes).flags, VFU_HDR_REPLY);
    }
}

/* The loop ends when it is told to, before it has begun, while it sleeps and while it serves; and goes on when it is called again. */
START_TEST(run_and_stop)
{
    struct sockaddr_un address;
    socklen_t len;
    vfu_dev_desc desc = rig_desc(&R);
    desc.busy_us = _i ? 200 : 0;
    rig_create(&R, &desc);
    ck_assert_int_eq(vfu_dev_attach(R.dev, listener(&address, &len)), 0);
    vfu_dev_stop(R.dev);
    ck_assert_int_eq(vfu_dev_run(R.dev), 0);
    for (unsigned round = 0; round < 200; round++) {
        pthread_t thread;
        peer p = {.sock = -1};
        ck_assert_int_eq(pthread_create(&thread, NULL, run, R.dev), 0);
        if (round % 4) {
            p.sock = connect_to(&address, len);
            talk(&p);
        }
        if (round % 4 == 2)
            peer_close(&p);
        vfu_dev_stop(R.dev);
        pthread_join(thread, NULL);
        ck_assert_int_eq(run_result, 0);
        peer_close(&p);
        settle(R.dev);
    }
    ck_assert_uint_eq(R.connects, 150);
    ck_assert_uint_eq(R.disconnects, 150);
    rig_destroy(&R);
}
END_TEST

/* For a connected socket that was attached, the loop ends with the client. */
START_TEST(run_ends_with_the_client)
{
    vfu_dev_desc desc = rig_desc(&R);
    rig_create(&R, &desc);
    for (unsigned round = 0; round < 50; round++) {
        pthread_t thread;
        rig_connect(&R);
        ck_assert_int_eq(pthread_create(&thread, NULL, run, R.dev), 0);
        talk(&R.client);
        peer_close(&R.client);
        pthread_join(thread, NULL);
        ck_assert_int_eq(run_result, -ENOTCONN);
    }
    ck_assert_uint_eq(R.disconnects, 50);
    rig_destroy(&R);
}
END_TEST

static atomic_bool has_started;

/* A signal for a thread before its first blocking call can be lost by ThreadSanitizer. */
static void *start_and_run(void *arg)
{
    poll(NULL, 0, 0);
    atomic_store(&has_started, true);
    return run(arg);
}

/* A signal handler may stop it. */
static void stop_in_handler(int number)
{
    (void)number;
    vfu_dev_stop(R.dev);
}

START_TEST(stop_by_signal)
{
    struct sockaddr_un address;
    socklen_t len;
    vfu_dev_desc desc = rig_desc(&R);
    struct sigaction action, before;
    memset(&action, 0, sizeof(action));
    action.sa_handler = stop_in_handler;
    rig_create(&R, &desc);
    ck_assert_int_eq(vfu_dev_attach(R.dev, listener(&address, &len)), 0);
    must(sigaction(SIGUSR1, &action, &before));
    for (unsigned round = 0; round < 100; round++) {
        pthread_t thread;
        atomic_store(&has_started, false);
        ck_assert_int_eq(pthread_create(&thread, NULL, start_and_run, R.dev), 0);
        while (!atomic_load(&has_started))
            sched_yield();
        ck_assert_int_eq(pthread_kill(thread, SIGUSR1), 0);
        pthread_join(thread, NULL);
        ck_assert_int_eq(run_result, 0);
    }
    must(sigaction(SIGUSR1, &before, NULL));
    rig_destroy(&R);
}
END_TEST

/* ---- many devices ------------------------------------------------------------------------------------------------------------------------------- */

enum { DEVICES = 4, DEVICE_ROUNDS = 60 };
static rig rigs[DEVICES];

/* A device with its client: mappings of a file that shrinks and grows under it, interrupts, and a new client each time. */
static void *one_device(void *arg)
{
    rig *r = arg;
    uint8_t buf[2 * PAGE];
    sigset_t mask;
    int file = memfd("many", 2 * PAGE, 0), fd = event();
    pthread_sigmask(SIG_SETMASK, NULL, &mask);
    for (unsigned round = 0; round < DEVICE_ROUNDS; round++) {
        rig_connect(r);
        greet(r);
        must(ftruncate(file, 2 * PAGE));
        ck_assert_int_eq(ask_map(r, 0, 2 * PAGE, RW, file, 0), 0);
        ck_assert_int_eq(ask_irqs(r, EVENTFD_TRIGGER, 2, 0, 1, NULL, &fd, 1), 0);
        vfu_dma dma = {.buf = buf, .len = sizeof(buf), .to_client = round % 2};
        ck_assert_int_eq(vfu_dev_dma(r->dev, &dma), 0);
        must(ftruncate(file, PAGE));
        ck_assert_int_eq(vfu_dev_dma(r->dev, &dma), -EFAULT);
        ck_assert_uint_eq(dma.fault, PAGE);
        pthread_sigmask(SIG_SETMASK, &mask, NULL); /* ThreadSanitizer blocks all signals in handlers, and the guard leaves by a jump */
        ck_assert_int_eq(vfu_dev_raise(r->dev, 2, 0), 0);
        ck_assert_uint_eq(signals(fd), 1);
        check_healthy(r);
        rig_leave(r);
    }
    close(file);
    close(fd);
    return NULL;
}

START_TEST(devices_share_nothing)
{
    pthread_t threads[DEVICES];
    for (unsigned i = 0; i < DEVICES; i++) {
        vfu_dev_desc desc = rig_desc(&rigs[i]);
        rig_create(&rigs[i], &desc);
    }
    for (unsigned i = 0; i < DEVICES; i++)
        ck_assert_int_eq(pthread_create(&threads[i], NULL, one_device, &rigs[i]), 0);
    for (unsigned i = 0; i < DEVICES; i++)
        pthread_join(threads[i], NULL);
    for (unsigned i = 0; i < DEVICES; i++) {
        ck_assert_uint_eq(rigs[i].connects, DEVICE_ROUNDS);
        ck_assert_uint_eq(rigs[i].disconnects, DEVICE_ROUNDS);
        ck_assert_uint_eq(rigs[i].maps, rigs[i].unmaps);
        rig_destroy(&rigs[i]);
    }
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("device, threads");
    TCase *tc = tcase_create("threads");
    tcase_add_checked_fixture(tc, note_fds, check_fds);
    tcase_add_test(tc, raise_while_the_client_assigns);
    tcase_add_loop_test(tc, run_and_stop, 0, 2);
    tcase_add_test(tc, run_ends_with_the_client);
    tcase_add_test(tc, stop_by_signal);
    tcase_add_test(tc, devices_share_nothing);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
