#!/bin/busybox sh
# First process of a guest with open-iscsi: it logs in to a target over its network, and has a
# file system and fio's verification on the disk.
#
#   first   makes the file system, then writes and verifies until told to stop
#   again   mounts it, and compares what the last run noted with what is there
#
# What the console says:
#   LOGGED IN | MOUNTED | FIO n (n rounds verified) | SAME n (n files) | DONE | FAILED why

PATH=/bin:/sbin:/usr/bin:/usr/sbin
DISK=/disk

fail() {
    echo "FAILED $*"
    dmesg | tail -n 15
    poweroff -f
    sleep 60
}

option() { # name: the value of vrep.<name> on the kernel command line
    for word in $(cat /proc/cmdline); do
        case $word in
        vrep."$1"=*) echo "${word#*=}" ;;
        esac
    done
}

set_node() { # key value
    iscsiadm -m node -T "$target" -p "$portal" -o update -n "$1" -v "$2" >/tmp/out 2>&1 ||
        fail "iscsiadm $1: $(cat /tmp/out)"
}

/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmp /tmp
mkdir -p /run/lock/iscsi /etc/iscsi /var/lib /root
while read -r module; do
    insmod "/modules/$module" || fail "module $module"
done </modules/order
echo "root:x:0:0:root:/root:/bin/sh" >/etc/passwd
echo "root:x:0:" >/etc/group
echo "InitiatorName=iqn.2026-01.invalid.test:guest" >/etc/iscsi/initiatorname.iscsi
: >/etc/iscsi/iscsid.conf

target=$(option target) portal=$(option portal)
ip link set lo up
ip link set eth0 up || fail "no network"
ip addr add 10.0.2.15/24 dev eth0
ip route add default via 10.0.2.2

iscsid || fail iscsid
iscsiadm -m node -o new -T "$target" -p "$portal" >/tmp/out 2>&1 || fail "node: $(cat /tmp/out)"
set_node node.session.auth.authmethod CHAP
set_node node.session.auth.username user
set_node node.session.auth.password initiator-secret
set_node node.session.auth.username_in target
set_node node.session.auth.password_in target-secret-2
set_node "node.conn[0].iscsi.HeaderDigest" CRC32C
set_node "node.conn[0].iscsi.DataDigest" CRC32C
set_node node.session.timeo.replacement_timeout 120
iscsiadm -m node -T "$target" -p "$portal" --login >/tmp/out 2>&1 || fail "login: $(cat /tmp/out)"
echo "LOGGED IN"
tries=0
until [ -b /dev/sda ]; do
    tries=$((tries + 1))
    [ $tries -le 300 ] || fail "no disk"
    sleep 0.1
done

case $(option do) in
first)
    /usr/sbin/mke2fs -q -t ext4 -E lazy_itable_init=0,lazy_journal_init=0 /dev/sda >/tmp/out 2>&1 ||
        fail "mke2fs: $(cat /tmp/out)"
    mount -t ext4 -o discard /dev/sda $DISK || fail mount
    echo MOUNTED
    n=0
    while :; do
        fio --name=verify --directory=$DISK --filename=data --size=6M --rw=randwrite --bsrange=4k-64k \
            --ioengine=libaio --iodepth=8 --direct=1 --verify=crc32c --do_verify=1 --verify_fatal=1 \
            --randseed=$((n + 1)) --eta=never --output=/tmp/fio >/tmp/out 2>&1 || fail "fio: $(tail -n 5 /tmp/fio)"
        cp $DISK/data $DISK/copy.$((n % 3)) && sync $DISK/copy.$((n % 3)) || fail copy
        (cd $DISK && sha256sum copy.? >sums.new && sync sums.new && mv sums.new sums && sync .) ||
            fail sums
        rm -f $DISK/copy.$(((n + 1) % 3))
        (cd $DISK && sha256sum copy.? >sums.new && sync sums.new && mv sums.new sums && sync .) ||
            fail sums
        n=$((n + 1))
        # What the kernel says when an error reaches a file system or a program.
        dmesg | grep -iE "I/O error|EXT4-fs error|Medium Error|Remounting" && fail "errors"
        echo "FIO $n"
        read -r -t 0.05 word && [ "$word" = stop ] && break
    done
    ;;
again)
    mount -t ext4 /dev/sda $DISK || fail mount
    echo MOUNTED
    ;;
esac
(cd $DISK && sha256sum -c sums >/tmp/sums 2>&1) || fail "sums: $(cat /tmp/sums)"
echo "SAME $(grep -c ': OK$' /tmp/sums)"
umount $DISK || fail umount
iscsiadm -m node -T "$target" -p "$portal" --logout >/tmp/out 2>&1 || fail "logout: $(cat /tmp/out)"
echo DONE
poweroff -f
