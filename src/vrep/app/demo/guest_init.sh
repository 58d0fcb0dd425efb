#!/bin/busybox sh
# First process of the demonstration guest: loads the disk drivers, mounts the
# ext4 disk and does what `vrep.mode` on the kernel command line asks for.
#
#   workload   append numbered, fsynced lines until stopped; copy and delete files
#   continue   go on from the last line that the disk holds, then power off
#   verify     compare every file with MANIFEST.sha256, then power off
#
# Modes can be joined by commas; `verify` runs before the lines.
#
# What the console says (one event per line, the host parses it):
#   CLOCK?                  the host answers with its time in ms
#   READY                   disk mounted
#   LINE n ms               line n is fsynced (the outside witness)
#   CHURN k name            copy k of file `name` is fsynced and renamed
#   CONTINUED from n        the disk's last line was n
#   VERIFY ok|bad n         n files compared
#   READ n                  every file was read from the disk n times, and was right
#   STOPPED n | FAILED why | POWEROFF
#
# One line of log/lines.txt is 64 bytes, so that it never crosses a disk block:
#   L nnnnnnnnnn mmmmmmmmmmmmm rrrrrrrr cccccccc ..................
# number, ms, run id, checksum chained over all lines before; see guest_check.py.

PATH=/bin
DISK=/disk
LOG=$DISK/log/lines.txt
MASK=4294967295

fail() {
    echo "FAILED $*"
    sync
    umount $DISK 2>/dev/null
    poweroff -f
    sleep 60
}

option() { # name default: the value of vrep.<name> on the kernel command line
    for word in $(cat /proc/cmdline); do
        case $word in
        vrep."$1"=*) echo "${word#*=}"; return ;;
        esac
    done
    echo "$2"
}

set_now() { # now: milliseconds on the host's clock
    now=$EPOCHREALTIME
    frac=${now#*.}
    now=$((${now%.*} * 1000 + 1${frac%???} - 1000 + offset))
}

set_check() { # n: chains the checksum over the line that is about to be written
    check=$((((check ^ $1) * 2654435761) & MASK))
    check=$((((check ^ (check >> 15) ^ (now & MASK)) * 2246822519) & MASK))
    check=$((((check ^ (check >> 13) ^ 0x$run) * 3266489917) & MASK))
    check=$((check ^ (check >> 16)))
}

append_line() { # n
    set_now
    set_check "$1"
    printf 'L %010d %013d %s %08x ..................\n' \
        "$1" "$now" "$run" "$check" >&3 || fail "write of line $1"
    sync $LOG || fail "fsync of line $1"
    echo "LINE $1 $now"
}

find_last_line() { # last, check: what the disk holds; a torn tail is cut off
    last=0 check=0
    size=$(stat -c %s $LOG 2>/dev/null) || return
    whole=$((size / 64))
    if [ $((whole * 64)) -ne "$size" ]; then
        echo "TORN $((size - whole * 64))"
        truncate -s $((whole * 64)) $LOG || fail "truncate of $LOG"
    fi
    [ $whole -gt 0 ] || return
    set -- $(dd if=$LOG bs=64 skip=$((whole - 1)) count=1 status=none)
    [ "$1" = L ] && [ $# -eq 6 ] || fail "last line is damaged"
    last=$((1$2 - 10000000000))
    check=$((0x$5))
}

churn() { # copies files, fsyncs and renames them, deletes the oldest
    set -- $(sed -n 's/^[0-9a-f]*  files\/small\///p' $DISK/MANIFEST.sha256)
    [ $# -gt 0 ] || return
    k=0
    while :; do
        for name; do
            [ ! -e /tmp/stop ] || return 0
            k=$((k + 1))
            new=$DISK/churn/$run-$k@$name
            cp "$DISK/files/small/$name" "$new.tmp" && sync "$new.tmp" &&
                mv "$new.tmp" "$new" && sync $DISK/churn || fail "copy of $name"
            echo "CHURN $k $name"
            [ $k -le "$churn_keep" ] || rm -f $DISK/churn/"$run"-$((k - churn_keep))@*
            sleep "$churn_pause"
        done
    done
}

verify() {
    if (cd $DISK && sha256sum -c MANIFEST.sha256 >/tmp/verify 2>&1); then
        echo "VERIFY ok $(wc -l </tmp/verify)"
    else
        grep -v ': OK$' /tmp/verify | head -n 20
        echo "VERIFY bad $(grep -c ': OK$' /tmp/verify)"
    fi
}

reread() { # reads every file from the disk again and again
    k=0
    while [ ! -e /tmp/stop ]; do
        echo 3 >/proc/sys/vm/drop_caches
        (cd $DISK && sha256sum -c MANIFEST.sha256 >/tmp/reread 2>&1) ||
            fail "reading: $(grep -v ': OK$' /tmp/reread | head -n 3)"
        k=$((k + 1))
        echo "READ $k"
    done
}

write_lines() { # count: 0 means until the host says stop or kills the guest
    mkdir -p $DISK/log $DISK/churn
    exec 3>>$LOG
    n=$last end=$((last + $1))
    while [ "$1" -eq 0 ] || [ $n -lt $end ]; do
        n=$((n + 1))
        append_line $n
        # The pause is also where a command of the host is heard.
        read -r -t "$pause" word && [ "$word" = stop ] && break
    done
    exec 3>&-
}

/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmp /tmp
stty -echo <&1
while read -r module; do
    insmod "/modules/$module" || fail "module $module"
done </modules/order

tries=0
device=
until [ -n "$device" ]; do
    # The first disk, on virtio-scsi or on virtio-blk.
    for name in /dev/sda /dev/vda; do
        [ -b $name ] && device=$name
    done
    [ -z "$device" ] || break
    tries=$((tries + 1))
    [ $tries -le 300 ] || fail "no disk"
    sleep 0.1
done
mount -t ext4 -o "$(option mount discard)" $device $DISK || fail "mount of $device"

# The host's answer can only arrive late, so a stamp is never ahead of the host.
offset=0
echo "CLOCK?"
if read -r -t 5 host; then
    set_now
    offset=$((host - now))
fi
echo "READY $(option mode workload)"

run=$(option run 00000000)
pause=$(option pause 0.05)
churn_pause=$(option churn_pause 0.2)
churn_keep=$(option churn_keep 8)
modes=,$(option mode workload),

case $modes in *,verify,*) verify ;; esac
case $modes in
*,workload,*)
    find_last_line
    mkdir -p $DISK/churn
    [ "$(option churn 1)" = 0 ] || churn &
    [ "$(option reread 0)" = 0 ] || reread &
    write_lines 0
    : >/tmp/stop
    wait
    echo "STOPPED $n"
    ;;
*,continue,*)
    find_last_line
    echo "CONTINUED from $last"
    write_lines "$(option lines 20)"
    echo "STOPPED $n"
    ;;
esac

umount $DISK || fail "umount"
echo POWEROFF
poweroff -f
